"""Training memory of one process on a CPU, everything in FP32: what `glm5 train` needs on a laptop.

Here the numbers can be measured (`python -m benchmarks.memory`), so each term is a count and not a rule of thumb.
Weights, gradients and optimizer states are 4 bytes each, without masters. Activations are the tensors that a step of
pre-training keeps for backward: dense attention in the expanded form over a packed row, experts, one MTP step, counted
from the model's code (a test counts them again by the hooks of autograd). The peak is one of two moments: backward
begins (all activations, and two copies of the logits going forward, two going back), or it ends (all gradients).
Where all logits are more than are held at once (`glm5.model.head`), the first has those of one piece, and what that
adds to the gradient of the head. Gradients come as activations go, so the two are not added.

Left out: sparse attention and the indexer's loss, bf16 autocast, evaluation, what the allocator keeps between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm5.config import ModelConfig
from glm5.errors import InputError
from glm5.model import LOGITS
from glm5.planner.hardware import Hardware
from glm5.planner.quantity import Quantity, derive, given
from glm5.planner.shape import shape_of
from glm5.planner.training import TrainingPlan, is_orthogonalised

PROCESS = 350e6
SCRATCH = 25e6
ATTENTION_BLOCK = 1 << 23
"""Queries x keys of the largest mask of packed rows that attention makes at once (`glm5.ops.attention`)."""


@dataclass(frozen=True)
class HostTrainingMemory:
    """Bytes of the process at its peak."""

    plan: TrainingPlan
    process: Quantity
    scratch: Quantity
    weights: Quantity
    gradients: Quantity
    optimizer: Quantity
    saved_activations: Quantity
    layer_activations: Quantity
    logits: Quantity
    total: Quantity
    capacity: Quantity

    @property
    def fits(self) -> bool:
        """Whether the total is within the machine."""
        return self.total.value <= self.capacity.value


def host_training_memory(config: ModelConfig, plan: TrainingPlan, hardware: Hardware) -> HostTrainingMemory:
    """The memory plan. Raises `InputError` for more than one process."""
    plan.check(config)
    if plan.devices * hardware.count > 1:
        raise InputError(
            f"FP32 planning is for one process on one machine, not for {plan.devices} process(es) on {hardware.name}; "
            "plan with --parallel.precision bf16."
        )
    counts = {"all": 0, "indexers": 0, "matrices": 0}
    for t in shape_of(config, "host").tensors:
        if t.storage == "fp32":
            continue
        counts["all"] += t.parameters
        if t.part == "indexer":
            counts["indexers"] += t.parameters
        elif is_orthogonalised(t) and (plan.mtp or not t.mtp):
            counts["matrices"] += t.parameters
        elif t.mtp and not plan.mtp:
            counts["indexers"] += t.parameters  # weights without a gradient
    trained = counts["all"] - counts["indexers"]
    weights = derive("Weights", "B", "4 * weights", weights=counts["all"], source="FP32, indexers included")
    gradients = derive("Gradients", "B", "4 * trained", trained=trained, source="pre-training leaves indexers alone")
    if plan.optimizer == "muon":
        optimizer = derive("Optimizer", "B", "4 * matrices + 8 * others", matrices=counts["matrices"],
                           others=trained - counts["matrices"],
                           source="a momentum per matrix, two moments for tables and norms")  # fmt: skip
    else:
        optimizer = derive("Optimizer", "B", "8 * trained", trained=trained, source="two moments")
    saved, layer, logits = _activations(config, plan)
    process = given("Process", PROCESS, "B", "measured: Python, PyTorch and glm5 after a step of a tiny model")
    scratch = given("Scratch of kernels", SCRATCH, "B", "measured: packed operands of the matrix products")
    capacity = given("Memory of the machine", hardware.device.memory_gb * 1e9, "B", hardware.device.source)
    total = derive(
        "Peak of the process", "B",
        "process + scratch + weights + optimizer + max(saved + max(logits, layer), gradients + layer)", process=process,
        scratch=scratch, weights=weights, optimizer=optimizer, saved=saved, logits=logits, layer=layer,
        gradients=gradients, source="backward begins, or it ends",
    )  # fmt: skip
    return HostTrainingMemory(
        plan, process, scratch, weights, gradients, optimizer, saved, layer, logits, total, capacity
    )


def saved_per_token(c: ModelConfig, *, mtp: bool) -> dict[str, Quantity]:
    """FP32 values that backward needs per token, without masks and logits: of one layer, its MLPs, and the ends."""
    attention = derive(
        "attention", "", "6 * hidden + 3 * q_latent + 3 * kv_latent + 2 * rotary + heads * (4 * wide + value + 1) + 3",
        hidden=c.hidden_size, q_latent=c.q_lora_rank, kv_latent=c.kv_lora_rank, rotary=c.qk_rope_head_dim,
        heads=c.num_attention_heads, wide=max(c.qk_head_dim, c.v_head_dim), value=c.v_head_dim,
        source="norms keep input and normalised input; queries, keys, values and outputs are padded to one width",
    )  # fmt: skip
    dense = derive("dense MLP", "", "4 * inner", inner=c.intermediate_size)
    experts = derive(
        "experts", "", "chosen * (2 * hidden + 4 * inner + 8) + 4 * shared * inner + experts",
        chosen=c.num_experts_per_tok, hidden=c.hidden_size, inner=c.moe_intermediate_size, shared=c.n_shared_experts,
        experts=c.n_routed_experts,
    )  # fmt: skip
    ends = derive("norms of the head and the MTP module", "", "norms * hidden", norms=11 if mtp else 3,
                  hidden=c.hidden_size)  # fmt: skip
    return {"attention": attention, "dense": dense, "experts": experts, "ends": ends}


def _activations(c: ModelConfig, plan: TrainingPlan) -> tuple[Quantity, Quantity, Quantity]:
    """(kept until backward, one layer of it at work, logits)."""
    mtp = plan.mtp and c.num_nextn_predict_layers > 0
    tokens = derive("tokens", "", "rows * length", rows=plan.micro_batch, length=plan.sequence)
    parts = saved_per_token(c, mtp=mtp)
    sparse = c.mlp_layer_types.count("sparse") + mtp
    layers = c.num_hidden_layers + mtp
    mask = derive("mask of a layer", "B", "4 * min(tokens * length, block)", tokens=tokens, length=plan.sequence,
                  block=ATTENTION_BLOCK, source="packed rows, one block of queries")  # fmt: skip
    kept_masks = layers if tokens.value * plan.sequence <= ATTENTION_BLOCK else 0
    logits, waiting = _logits(c, tokens, mtp=mtp)
    row = derive("row", "", "attention + max(dense, experts)", attention=parts["attention"], dense=parts["dense"],
                 experts=parts["experts"])  # fmt: skip
    if plan.checkpointing:
        saved = derive("Saved activations", "B", "4 * tokens * (layers * hidden + ends)", tokens=tokens, layers=layers,
                       hidden=c.hidden_size, ends=parts["ends"], source="each layer's input")  # fmt: skip
        layer = derive(
            "Activations of one layer", "B", "3 * (4 * tokens * row + mask) + waiting", tokens=tokens, row=row,
            mask=mask, waiting=waiting, source="computed again, their gradients, products on the way",
        )  # fmt: skip
        return saved, layer, logits
    saved = derive(
        "Saved activations", "B",
        "4 * tokens * (layers * attention + sparse * experts + dense_layers * dense + ends) + masks * mask",
        tokens=tokens, layers=layers, attention=parts["attention"], sparse=sparse, experts=parts["experts"],
        dense_layers=c.mlp_layer_types.count("dense"), dense=parts["dense"], ends=parts["ends"], masks=kept_masks,
        mask=mask,
    )  # fmt: skip
    layer = derive("Activations of one layer", "B", "4 * tokens * row + mask", tokens=tokens, row=row, mask=mask,
                   source="gradients of the layer that backward is in")  # fmt: skip
    return saved, layer, logits


def _logits(c: ModelConfig, tokens: Quantity, *, mtp: bool) -> tuple[Quantity, Quantity]:
    """(at the start of the backward pass, what of them waits while it goes through the MTP module)."""
    if tokens.value * c.vocab_size * (1 + mtp) > LOGITS:
        by_pieces = derive(
            "Logits", "B", "4 * (3 * min(tokens * vocabulary, held) + 2 * hidden * vocabulary)", tokens=tokens,
            held=LOGITS, hidden=c.hidden_size, vocabulary=c.vocab_size,
            source="of one piece: log-softmax and two gradients; the head's gradient, and what the piece adds to it",
        )  # fmt: skip
        return by_pieces, given("waiting logits", 0, "B", "none: a piece is made again when it is needed")
    at_once = derive("Logits", "B", "4 * tokens * vocabulary * copies", tokens=tokens, vocabulary=c.vocab_size,
                     copies=4 if mtp else 3, source="of the trunk and of the draft step: values and log-softmax, or "
                     "its gradient")  # fmt: skip
    waiting = derive("waiting logits", "B", "4 * tokens * vocabulary * mtp", tokens=tokens, vocabulary=c.vocab_size,
                     mtp=int(mtp), source="of the trunk")  # fmt: skip
    return at_once, waiting
