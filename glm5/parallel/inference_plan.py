"""`InferencePlan`: over how many processes an engine is cut, and which part of every weight a process holds.

All processes compute all tokens; they hold different parts of the weights (Megatron-LM, arXiv 1909.08053, section 3, on
MLA; whole experts as in GShard, arXiv 2006.16668, without its exchange of tokens, which have nowhere else to be):

    heads of `q_b_proj`, `kv_b_proj` (rows), `o_proj` (columns)             over `tensor` processes
    routed experts                                                          whole ones over `expert` processes, ...
    their inner widths                                                      ... and over `processes / expert`
    dense and shared feed-forward (rows of gate and up, columns of down)    over all processes
    embedding and output head (rows)                                        over all processes

The smaller of `tensor` and `expert` divides the larger, which is the number of processes. Where `expert` is larger,
attention is repeated by `processes / tensor` groups. The latents are one row for all heads, so the projections into
them, the cache and the indexer are on every process, and all choose the same positions without asking.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from glm5.config import ModelConfig
from glm5.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


@dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """How an engine is cut; the default is one process."""

    tensor: int = 1
    """Processes that share the attention heads."""
    expert: int = 1
    """Processes that share the routed experts."""
    timeout_seconds: float = 120.0
    """How long a process waits for another inside a step before the engine is given up."""
    backend: Literal["gloo", "nccl"] | None = None
    """What carries activations; NCCL on GPUs and gloo elsewhere when left out."""

    @property
    def processes(self) -> int:
        """Processes in all."""
        return max(self.tensor, self.expert)

    def check(self, config: ModelConfig) -> None:
        """Raises `InputError` for a plan by which `config` cannot be cut."""
        for name in ("tensor", "expert"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if not self.timeout_seconds > 0:
            raise InputError(f"timeout_seconds is {self.timeout_seconds!r}; it must be more than 0.")
        world = self.processes
        if world % min(self.tensor, self.expert):
            raise InputError(
                f"tensor={self.tensor} and expert={self.expert} share the same processes, so the smaller must divide "
                f"the larger; try tensor={world}, expert={world}."
            )
        shared = config.moe_intermediate_size * config.n_shared_experts
        cuts = [
            ("attention heads", config.num_attention_heads, "tensor", self.tensor),
            ("routed experts", config.n_routed_experts, "expert", self.expert),
            ("columns of an expert (moe_intermediate_size)", config.moe_intermediate_size, "processes / expert",
             world // self.expert),
            ("columns of the dense feed-forward (intermediate_size)", config.intermediate_size, "processes", world),
            ("columns of the shared expert", shared, "processes", world),
            ("tokens of the vocabulary", config.vocab_size, "processes", world),
        ]  # fmt: skip
        for what, size, axis, count in cuts:
            if size % count:
                raise InputError(f"{size:,} {what} do not divide over {axis} = {count}; use another number of them.")

    def check_world(self, world: int) -> None:
        """Raises `InputError` unless the plan is for `world` processes."""
        if world == self.processes:
            return
        named = f"tensor={self.tensor}, expert={self.expert}"
        if self.processes == 1:
            remedy = f"ask for tensor={world}, expert={world}, or start one process"
        else:
            remedy = f"start {self.processes} with `torchrun --nproc-per-node {self.processes}`"
        raise InputError(f"The engine is cut over {self.processes} process(es) ({named}), but {world} run; {remedy}.")


@dataclass(frozen=True)
class Part:
    """What process `rank` of a plan holds."""

    plan: InferencePlan
    rank: int

    @property
    def tensor(self) -> tuple[int, int]:
        """(which part of the heads, of how many)."""
        return self.rank % self.plan.tensor, self.plan.tensor

    @property
    def expert(self) -> tuple[int, int]:
        """(which of the ranges of whole experts, of how many)."""
        return self.rank // (self.plan.processes // self.plan.expert), self.plan.expert

    @property
    def column(self) -> tuple[int, int]:
        """(which part of the inner width of its experts, of how many)."""
        columns = self.plan.processes // self.plan.expert
        return self.rank % columns, columns

    @property
    def tensor_ranks(self) -> list[int]:
        """The processes that hold the other heads of this one's attention."""
        first = self.rank - self.rank % self.plan.tensor
        return list(range(first, first + self.plan.tensor))

    def cuts(self, name: str) -> dict[int, tuple[int, int]]:
        """By dimension, the part of a weight that is held. `name` is the model's, or that of one expert on disk.

        Of the model's fused `gate_up_proj` [E, 2I, D] the dimensions are those of [E, 2, I, D].
        """
        world = self.rank, self.plan.processes
        if name.endswith(".experts.gate_up_proj"):
            return {0: self.expert, 2: self.column}
        if name.endswith(".experts.down_proj"):
            return {0: self.expert, 2: self.column}
        if name.endswith((".q_b_proj.weight", ".kv_b_proj.weight")):
            return {0: self.tensor}
        if name.endswith(".o_proj.weight"):
            return {1: self.tensor}
        inner = self.column if _EXPERT.fullmatch(name) else world
        if name.endswith((".gate_proj.weight", ".up_proj.weight")):
            return {0: inner}
        if name.endswith(".down_proj.weight"):
            return {1: inner}
        return {0: world} if name.endswith(("embed_tokens.weight", "lm_head.weight")) else {}

    def take(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole weight of the model: a view, or a copy where the parts do not touch."""
        fused = name.endswith(".experts.gate_up_proj")
        part = whole.unflatten(1, (2, -1)) if fused else whole
        for dim, (index, count) in self.cuts(name).items():
            size = part.shape[dim] // count
            part = part.narrow(dim, index * size, size)
        return part.flatten(1, 2) if fused else part

    def slices(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """`take` for a weight on disk, as an index; empty where all of it is held."""
        cuts = self.cuts(name)
        if all(count == 1 for _, count in cuts.values()):
            return ()
        found = []
        for dim, size in enumerate(shape):
            index, count = cuts.get(dim, (0, 1))
            found.append(slice(index * (size // count), (index + 1) * (size // count)))
        return tuple(found)

    def name_on_disk(self, name: str, experts_here: int) -> str:
        """Of a weight of a model that holds `experts_here` experts a layer, the name in the whole model's files."""
        match = _EXPERT.fullmatch(name)
        return f"{match[1]}{int(match[2]) + self.expert[0] * experts_here}{match[3]}" if match else name


def shapes_of(part: Part, whole: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of what a process holds of a model's `state_dict` (which may lie on the meta device)."""
    return {name: tuple(part.take(name, tensor).shape) for name, tensor in whole.items()}
