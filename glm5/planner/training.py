"""Training memory per device under a parallel plan.

The axes are those of `ParallelPlan`. Weights are BF16, gradients FP32, and the optimizer keeps
FP32 masters beside its states: one momentum for a Muon matrix, two moments for AdamW. Under Muon the vocabulary tables,
norms and vectors stay with AdamW (GLM-5 report, appendix A). `shard` says what is cut over the devices that would
otherwise hold equal copies (`data_shard * context` for dense weights; for routed experts, which `expert` of them share,
those times `tensor` over `expert`). Activations count the tensors that backward needs, in BF16; with activation
checkpointing each layer keeps its input only, and one layer is recomputed at a time. The fullest device is that of the
first or last pipeline stage under a 1F1B schedule.

A plan in FP32 (one process on a CPU) is `host_training.py`'s. Left out: scratch of kernels and collectives beyond the
reserve, the indexer's KL blocks, imbalance between experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from glm5.config import ModelConfig
from glm5.errors import InputError
from glm5.parallel import ParallelPlan
from glm5.planner.hardware import Hardware
from glm5.planner.memory import RESERVE
from glm5.planner.quantity import Quantity, derive, given
from glm5.planner.shape import Tensor, shape_of
from glm5.planner.weights import Shares, check_dtype, parameter_shares

Optimizer = Literal["muon", "adamw"]
Shard = Literal["none", "optimizer", "gradients", "full"]
Precision = Literal["bf16", "fp32"]
_LOGIT_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(ParallelPlan):
    """The parallel plan of a run, and what else decides over its memory."""

    micro_batch: int = 1
    """Sequences per forward pass of a replica."""
    sequence: int = 4096
    """Tokens per sequence."""
    optimizer: str = "muon"
    """muon or adamw."""
    shard: str = "full"
    """What is cut over equal copies: none, optimizer, gradients (and optimizer), full (and weights)."""
    checkpointing: bool = True
    """Keep each layer's input only, and recompute the rest in backward."""
    mtp: bool = True
    """Train the MTP layer too."""
    precision: str = "bf16"
    """bf16: BF16 weights with FP32 masters, over any devices. fp32: one process on a CPU, all in FP32."""

    def check(self, config: ModelConfig, *, length: int | None = None) -> None:
        """Raises `InputError` for a plan that `config` cannot be trained under."""
        for name in ("micro_batch", "sequence"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        check_dtype(self.optimizer, Optimizer, "optimizer")
        check_dtype(self.shard, Shard, "shard")
        check_dtype(self.precision, Precision, "precision")
        if self.sequence > config.max_position_embeddings:
            raise InputError(f"sequence {self.sequence:,} is beyond the {config.max_position_embeddings:,} positions.")
        super().check(config, length=self.sequence)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the fullest device."""

    plan: TrainingPlan
    weights: Quantity
    gathered: Quantity
    gradients: Quantity
    optimizer: Quantity
    saved_activations: Quantity
    layer_activations: Quantity
    logits: Quantity
    reserve: Quantity
    total: Quantity
    capacity: Quantity

    @property
    def fits(self) -> bool:
        """Whether the total is within the device."""
        return self.total.value <= self.capacity.value


def training_memory(config: ModelConfig, plan: TrainingPlan, hardware: Hardware) -> TrainingMemory:
    """The memory plan. Raises `InputError` when sizes do not divide or the device counts differ."""
    plan.check(config)
    if hardware.count != plan.devices:
        raise InputError(
            f"The parallel plan uses {plan.devices} device(s) (data {plan.data} x context {plan.context} x tensor "
            f"{plan.tensor} x pipeline {plan.pipeline}), but the hardware is {hardware.name}; "
            f"write {hardware.device.name}x{plan.devices} or change the plan."
        )
    stage = _stage(config, plan)
    local, matrices = parameter_shares(stage), parameter_shares(t for t in stage if is_orthogonalised(t))
    cut = {"none": 0, "optimizer": 1, "gradients": 2, "full": 3}[plan.shard]
    weights = _sharded("Weights", "2", local, plan, cut >= 3, "BF16")
    gradients = _sharded("Gradients", "4", local, plan, cut >= 2, "FP32")
    if plan.optimizer == "muon":
        others = Shares(local.copied - matrices.copied, local.tensor - matrices.tensor, local.all - matrices.all)
        momentum = _sharded("Muon: masters and momentum", "(4 + 4)", matrices, plan, cut >= 1, "FP32 matrices")
        moments = _sharded("AdamW: masters and two moments", "(4 + 8)", others, plan, cut >= 1, "tables and norms")
        optimizer = derive("Optimizer", "B", "muon + adamw", muon=momentum, adamw=moments,
                           source="FP32 masters; a momentum per matrix, two moments for tables and norms")  # fmt: skip
    else:
        optimizer = _sharded("Optimizer", "(4 + 8)", local, plan, cut >= 1, "FP32 masters and two moments")
    saved, layer, logits = _activations(config, plan)
    gathered = _gathered(config, plan) if cut >= 3 else given("Gathered layers", 0, "B", "weights are not cut")
    capacity = given("Memory of a device", hardware.device.memory_gb * 1e9, "B", hardware.device.source)
    reserve = derive("Reserve", "B", "share * capacity", share=RESERVE, capacity=capacity)
    total = derive(
        "Total per device", "B",
        "weights + gathered + gradients + optimizer + saved + layer + logits + reserve", weights=weights,
        gathered=gathered, gradients=gradients, optimizer=optimizer, saved=saved, layer=layer, logits=logits,
        reserve=reserve,
    )  # fmt: skip
    return TrainingMemory(plan, weights, gathered, gradients, optimizer, saved, layer, logits, reserve, total, capacity)


def is_orthogonalised(t: Tensor) -> bool:
    """What Muon takes: every matrix but the vocabulary tables (a stack of norms is not a matrix)."""
    return t.storage != "table" and t.rows > 1 and "norm" not in t.name


def _stage(config: ModelConfig, plan: TrainingPlan) -> list[Tensor]:
    """The tensors of the fullest stage: the most layers, the most of them sparse, and the heavier end of the model."""
    per_stage = ceil(config.num_hidden_layers / plan.pipeline)
    sparse = min(per_stage, sum(kind == "sparse" for kind in config.mlp_layer_types))
    whole = shape_of(config, "stage").tensors
    trainable = [t for t in whole if t.storage != "fp32" and (plan.mtp or not t.mtp)]
    if plan.pipeline == 1:
        return trainable
    layers = {"sparse": sparse, "dense": per_stage - sparse, "full": min(per_stage, config.indexer_types.count("full"))}
    stage: list[Tensor] = []
    for t in trainable:
        if t.mtp or t.part in ("output head", "norms"):
            stage.append(t)  # the last stage; the trunk's norms are rounded up, they are negligible
        elif t.part != "embedding":
            kind = {"indexer": "full", "dense MLP": "dense", "attention": "all"}.get(t.part, "sparse")
            total = {
                "full": config.indexer_types.count("full"), "dense": config.mlp_layer_types.count("dense"),
                "sparse": config.mlp_layer_types.count("sparse"), "all": config.num_hidden_layers,
            }[kind]  # fmt: skip
            stage.append(replace(t, copies=t.copies // total * layers.get(kind, per_stage)))
    return stage


def _sharded(name: str, width: str, shares: Shares, plan: TrainingPlan, cut: bool, source: str) -> Quantity:
    """Bytes of one kind of state: `width` bytes for each weight that this device keeps."""
    dense = derive("dense", "", "copied + cut / tensor", copied=shares.copied, cut=shares.tensor, tensor=plan.tensor)
    if not cut:
        return derive(name, "B", f"{width} * (dense + experts / expert)", dense=dense, experts=shares.all,
                      expert=plan.expert, source=source)  # fmt: skip
    return derive(
        name, "B", f"{width} * (dense / shards + experts / (shards * tensor))", dense=dense,
        shards=plan.shards, experts=shares.all, tensor=plan.tensor, source=f"{source}, sharded",
    )  # fmt: skip


def _gathered(config: ModelConfig, plan: TrainingPlan) -> Quantity:
    """Fully sharded weights are gathered layer by layer: the one that runs and the one that comes."""
    layer = [t for t in shape_of(config, "layer").tensors if t.part in ("attention", "router", "shared experts",
             "routed experts") and not t.mtp and t.storage != "fp32"]  # fmt: skip
    shares = parameter_shares(layer)
    sparse, layers = max(config.mlp_layer_types.count("sparse"), 1), config.num_hidden_layers
    return derive(
        "Gathered layers", "B", "2 * 2 * ((copied + cut / tensor) / layers + experts / sparse_layers / expert)",
        copied=shares.copied, cut=shares.tensor, tensor=plan.tensor, layers=layers, experts=shares.all,
        sparse_layers=sparse, expert=plan.expert, source="two layers in BF16: the one that runs, the next one",
    )  # fmt: skip


def _activations(c: ModelConfig, plan: TrainingPlan) -> tuple[Quantity, Quantity, Quantity]:
    """(saved for backward, one layer in full, logits)."""
    tokens = derive("tokens", "", "micro_batch * sequence / context", micro_batch=plan.micro_batch,
                    sequence=plan.sequence, context=plan.context)  # fmt: skip
    row = derive(
        "row", "",
        "4 * hidden + 2 * (q_latent + kv_latent + index)"
        " + heads * (2 * query_key + nope + 2 * value) + experts * (2 * hidden + 4 * expert_width) + router",
        hidden=c.hidden_size, q_latent=c.q_lora_rank, kv_latent=c.kv_lora_rank + c.qk_rope_head_dim,
        index=c.index_n_heads * c.index_head_dim + c.index_head_dim, heads=c.num_attention_heads,
        query_key=c.qk_head_dim, nope=c.qk_nope_head_dim, value=c.v_head_dim,
        experts=c.num_experts_per_tok + c.n_shared_experts, expert_width=c.moe_intermediate_size,
        router=2 * c.n_routed_experts,
    )  # fmt: skip
    layers, batches = ceil(c.num_hidden_layers / plan.pipeline), plan.pipeline
    in_flight = "1F1B: the first stage holds one micro batch per stage"
    if plan.checkpointing:
        saved = derive(
            "Saved activations", "B", "batches * layers * tokens * hidden * 2 / tensor", batches=batches, layers=layers,
            tokens=tokens, hidden=c.hidden_size, tensor=plan.tensor, source=in_flight,
        )  # fmt: skip
    else:
        saved = derive("Saved activations", "B", "batches * layers * tokens * row * 2 / tensor", batches=batches,
                       layers=layers, tokens=tokens, row=row, tensor=plan.tensor, source=in_flight)  # fmt: skip
    layer = derive("Activations of one layer", "B", "2 * tokens * row * 2 / tensor", tokens=tokens, row=row,
                   tensor=plan.tensor, source=f"values and gradients; row: {row.substituted}")  # fmt: skip
    logits = derive("Logits", "B", "min(tokens, chunk) * vocabulary / tensor * (4 + 4)", tokens=tokens,
                    chunk=_LOGIT_CHUNK, vocabulary=c.vocab_size, tensor=plan.tensor,
                    source="FP32 logits and their gradient, in chunks of the sequence")  # fmt: skip
    return saved, layer, logits
