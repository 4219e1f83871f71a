"""`ParallelPlan`: over how many processes each axis of a run is cut, and whether a model can be cut so.

The world is `pipeline * data_replicate * data_shard * context * tensor` processes, in this order from the outermost to
the innermost, so that tensor-parallel neighbours sit on one machine. Experts have no processes of their own: expert
parallelism cuts them over processes that hold different tokens (`data_shard * context`), as in the GLM-5 report.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from glm5.config import ModelConfig
from glm5.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """A parallel plan; the default is one process."""

    data_replicate: int = 1
    """Copies of the whole set of shards; above 1 this is HSDP."""
    data_shard: int = 1
    """Processes that share parameters, gradients and optimizer states of a copy (FSDP), each with its own rows."""
    tensor: int = 1
    """Tensor-parallel processes (sequence parallel between the matrices)."""
    context: int = 1
    """Context-parallel processes: each holds a part of every sequence; they share shards too."""
    pipeline: int = 1
    """Pipeline stages."""
    expert: int = 1
    """Processes that share the routed experts of a layer; divides data_shard * context."""

    @property
    def devices(self) -> int:
        """Processes of the world."""
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def data(self) -> int:
        """Processes (or groups of them) that read different rows."""
        return self.data_replicate * self.data_shard

    @property
    def shards(self) -> int:
        """Processes over which parameters and states are cut."""
        return self.data_shard * self.context

    def data_index(self, rank: int) -> int:
        """Which of the `data` different parts of a batch process `rank` reads."""
        return rank // (self.context * self.tensor) % self.data

    def check(self, config: ModelConfig, *, length: int | None = None) -> None:
        """Raises `InputError` for a plan under which `config` (in rows of `length` tokens) cannot be trained."""
        for name in (field.name for field in fields(ParallelPlan)):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if length is not None and length < self.context:
            raise InputError(f"A sequence of {length} tokens cannot be cut over context={self.context} devices.")
        widths = {
            "heads": config.num_attention_heads,
            "columns of the dense feed-forward (intermediate_size)": config.intermediate_size,
            "columns of the shared expert": config.moe_intermediate_size * config.n_shared_experts,
            "tokens of the vocabulary": config.vocab_size,
            **({"experts": config.n_routed_experts} if self.expert == 1 else {}),
        }
        for name, width in widths.items():
            if width % self.tensor:
                raise InputError(f"{width:,} {name} do not divide over tensor={self.tensor} devices.")
        stage_layers(config, self.pipeline)
        if config.n_routed_experts % self.expert:
            raise InputError(f"{config.n_routed_experts} experts do not divide over expert={self.expert} devices.")
        if self.shards % self.expert:
            raise InputError(
                f"expert={self.expert} does not divide the {self.shards} devices of data_shard={self.data_shard} x "
                f"context={self.context}; experts are shared by devices that hold different tokens."
            )

    def check_world(self, world: int) -> None:
        """Raises `InputError` unless the plan is for `world` processes."""
        if self.devices == world:
            return
        names = ("pipeline", "data_replicate", "data_shard", "context", "tensor")
        cut = " x ".join(f"{name} {getattr(self, name)}" for name in names)
        remedy = f"start {self.devices} with `torchrun --nproc-per-node {self.devices}`"
        if self.devices == 1:
            remedy = f"give a plan, such as --parallel.data-shard {world}"
        raise InputError(f"The parallel plan is for {self.devices} process(es) ({cut}), but {world} run; {remedy}.")


def stage_layers(config: ModelConfig, stages: int) -> list[range]:
    """The layers of each stage: as even as cuts before full-indexer layers allow. Raises InputError if none do."""
    layers = config.num_hidden_layers
    if stages > layers:
        raise InputError(f"{layers} layers cannot fill pipeline={stages} stages.")
    full = [i for i, kind in enumerate(config.indexer_types) if kind == "full"]
    if stages > len(full):
        raise InputError(
            f"pipeline={stages} needs as many layers that select for themselves, but only {len(full)} of {layers} do "
            "(indexer_types); use fewer stages."
        )
    cuts = [0]
    for stage in range(1, stages):
        left = full[: len(full) - (stages - 1 - stage)]  # leaves a cut for every later stage
        cuts.append(min((i for i in left if i > cuts[-1]), key=lambda i: abs(i - stage * layers / stages)))
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], layers], strict=True)]
