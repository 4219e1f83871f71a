"""The model of one process of an engine that is cut over several (`inference_plan.py` says what is cut).

A cut model is the single-device model with fewer heads, experts and columns; what crosses processes are hooks at its
borders: the embedding, every attention and every feed-forward end in a sum over processes, the output head in a
gathering of the logits at the first process (the others never need them). All is for inference: plain tensors, no
gradients. The hidden state between the layers is the same on every process, to the bit, where their hardware is alike.
Left out: exchange of tokens between data-parallel attention groups, overlap of sums with computing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from glm5.model import GLM5
from glm5.model.layer import DecoderLayer
from glm5.model.moe import MoE
from glm5.ops.experts import Experts, run_experts
from glm5.parallel.inference_plan import InferencePlan, Part, shapes_of
from glm5.parallel.mesh import world_rank, world_size

PATIENCE = timedelta(days=365)
"""How long a process waits where only the end of another should end it."""


@dataclass(frozen=True)
class Groups:
    """The processes of an engine, as far as this one sees them."""

    part: Part
    device: torch.device
    everyone: ProcessGroup
    """All processes: activations and weights. An operation that waits longer than the plan's timeout fails."""
    tensor: ProcessGroup
    """Those that hold the other heads of this one's attention."""
    words: ProcessGroup
    """All processes, on the CPU: what to do next. The others wait for it as long as the first lives, but it gives up
    after the plan's timeout those that do not take it."""
    meeting: ProcessGroup
    """All processes, on the CPU: what they tell each other once all have loaded. Loading may take any time."""


def open_groups(plan: InferencePlan, device: torch.device) -> Groups:
    """The groups of `plan`, of the processes that torchrun started (inside `mesh.processes`).

    Raises `InputError` when the plan is for another number of processes than run.
    """
    plan.check_world(world_size())
    backend = plan.backend or ("nccl" if device.type == "cuda" else "gloo")
    timeout = timedelta(seconds=plan.timeout_seconds)
    part = Part(plan, world_rank())
    groups = {}
    for first in range(0, plan.processes, plan.tensor):  # everybody makes every group, in one order
        ranks = tuple(Part(plan, first).tensor_ranks)
        groups[ranks] = dist.new_group(list(ranks), timeout=timeout, backend=backend)
    everyone = dist.new_group(timeout=timeout, backend=backend)
    words = dist.new_group(timeout=timeout if part.rank == 0 else PATIENCE, backend="gloo")
    meeting = dist.new_group(timeout=PATIENCE, backend="gloo")
    return Groups(part, device, everyone, groups[tuple(part.tensor_ranks)], words, meeting)


def cut_model(model: GLM5, groups: Groups) -> None:
    """Cuts `model`, which lies on the meta device, down to what this process holds; to be allocated and filled then."""
    part = groups.part
    for name, shape in shapes_of(part, model.state_dict()).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if (whole := module._parameters.get(leaf)) is not None and whole.shape != shape:
            module._parameters[leaf] = nn.Parameter(whole.new_empty(shape), requires_grad=False)
    for layer in [*model.model.layers, *model.mtp]:
        assert isinstance(layer, DecoderLayer)
        mla = layer.self_attn
        heads = mla.config.num_attention_heads // part.plan.tensor
        mla.config = dataclasses.replace(mla.config, num_attention_heads=heads, num_key_value_heads=heads)
        if part.plan.tensor > 1:
            mla.o_proj.register_forward_hook(lambda module, args, y: _summed(y, groups.tensor))
        if isinstance(layer.mlp, MoE):
            _cut_experts(layer.mlp.experts, part)
            layer.mlp.register_forward_hook(lambda module, args, out: (_summed(out[0], groups.everyone), *out[1:]))
        else:
            layer.mlp.register_forward_hook(lambda module, args, y: _summed(y, groups.everyone))
    embedding: Any = model.model.embed_tokens
    embedding.__class__ = PartOfEmbedding
    embedding.first, embedding.group = part.rank * embedding.weight.shape[0], groups.everyone
    model.lm_head.register_forward_hook(lambda module, args, y: _at_first(y, part.rank, groups.everyone))


class PartOfEmbedding(nn.Embedding):
    """The rows of a range of the vocabulary; other ids give zeros, and the processes' sum gives all."""

    group: ProcessGroup
    first: int

    def forward(self, ids: Tensor) -> Tensor:
        here = ids - self.first
        mine = (here >= 0) & (here < self.weight.shape[0])
        rows = F.embedding(here.clamp(0, self.weight.shape[0] - 1), self.weight)
        return _summed(rows * mine.unsqueeze(-1), self.group)


class PartOfExperts(Experts):
    """A range of the experts. Pairs of token and expert that belong elsewhere are skipped; nothing is summed here."""

    first: int

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        here_NK = chosen_NK - self.first
        token_P, slot_P = ((here_NK >= 0) & (here_NK < self.down_proj.shape[0])).nonzero(as_tuple=True)
        if not len(token_P):
            return torch.zeros_like(x_ND)
        here_P1, weight_P1 = here_NK[token_P, slot_P, None], weights_NK[token_P, slot_P, None].to(x_ND.dtype)
        y_PD = run_experts(x_ND[token_P], here_P1, weight_P1, self.gate_up_proj, self.down_proj)
        y_NKD = x_ND.new_zeros(*chosen_NK.shape, x_ND.shape[1])  # not index_add_, whose order varies on GPUs
        y_NKD[token_P, slot_P] = y_PD
        return y_NKD.sum(1)


def _cut_experts(experts: Experts, part: Part) -> None:
    if part.plan.expert > 1:
        cut: Any = experts
        cut.__class__ = PartOfExperts
        cut.first = part.expert[0] * experts.down_proj.shape[0]


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of every process's `x`, in place where it can be."""
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def _at_first(x: Tensor, rank: int, group: ProcessGroup) -> Tensor:
    """On the first process everybody's columns, joined; on the others their own."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())] if rank == 0 else None
    dist.gather(x, parts, group=group, group_dst=0)
    return x if parts is None else torch.cat(parts, dim=-1)
