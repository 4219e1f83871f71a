"""Tensor parallel: heads, inner widths, whole experts and the vocabulary cut over the ranks of one mesh dimension.

Megatron-LM (arXiv 1909.08053, section 3) on MLA. What each rank holds:

- attention: its heads of `q_b_proj`, `kv_b_proj` (rows) and `o_proj` (columns). The latents are one row for all heads,
  so `q_a_proj`, `kv_a_proj_with_mqa` and their norms are replicated, and so is the indexer, which is small: every rank
  selects the same positions without a word to the others. Its target sums the attention over all heads, an all-reduce;
- dense and shared feed-forward: its rows of gate and up, its columns of down;
- routed experts: whole experts (all ranks hold all tokens, so there is nothing to send), which keeps the matrices that
  Muon orthogonalises whole. Where expert parallelism has the experts already, they are left alone;
- embedding and output head: its part of the vocabulary; the logits are joined again, so losses and samplers see the
  usual [B, T, V].

A cut module is the same single-device module with fewer heads or experts; what crosses ranks are hooks at its borders.
Weights become `DTensor`s (for checkpoints, FSDP and optimisers) of which the forward pass sees the local part.
Left out: sequence parallelism of the norms, logits that stay cut, adapters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from glm5.errors import InputError
from glm5.model import GLM5
from glm5.model.layer import DecoderLayer
from glm5.model.mla import MLA
from glm5.model.moe import MLP, MoE
from glm5.ops import reference
from glm5.ops.experts import Experts, run_experts
from glm5.ops.linear import Linear, LowRank
from glm5.ops.norm import RMSNorm
from glm5.parallel.collectives import copy_to, join, sum_over, total


def apply_tensor_parallel(model: GLM5, mesh: DeviceMesh) -> None:
    """Cuts `model`, whose whole weights are the same on all ranks of the one-dimensional `mesh`, in place.

    What must divide over the ranks is `ParallelPlan.check`'s to say. Raises InputError for a model with adapters.
    """
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise InputError("Adapters (LoRA) cannot be cut by tensor parallelism; merge them first, or use tensor=1.")
    for layer in [*model.model.layers, *model.mtp]:
        assert isinstance(layer, DecoderLayer)
        _cut_attention(layer.self_attn, mesh)
        if isinstance(layer.mlp, MoE):
            _cut_moe(layer.mlp, mesh)
        else:
            _cut_mlp(layer.mlp, mesh)
    _cut_vocabulary(model, mesh)


# ---- weights ----------------------------------------------------------------------------------------------------
def local(parameter: Tensor) -> Tensor:
    """This rank's part of a cut weight; its gradient becomes the DTensor's."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class CutLinear(Linear):
    """A `Linear` that computes with its rank's rows or columns."""

    def effective_weight(self) -> Tensor:
        return local(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight))


class CutEmbedding(nn.Embedding):
    """An embedding of which each rank holds a range of the vocabulary; other ids give zeros, and the ranks' sum all."""

    group: ProcessGroup
    first: int

    def forward(self, ids: Tensor) -> Tensor:
        weight = local(self.weight)
        here = ids - self.first
        mine = (here >= 0) & (here < weight.shape[0])
        rows = F.embedding(here.clamp(0, weight.shape[0] - 1), weight)
        return sum_over(rows * mine.unsqueeze(-1), self.group)


class CutExperts(Experts):
    """A rank's whole experts. All tokens are here; the pairs of token and expert that belong elsewhere are skipped."""

    group: ProcessGroup
    first: int

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        x_ND, weights_NK = copy_to(x_ND, self.group), copy_to(weights_NK, self.group)
        gate_up, down = local(self.gate_up_proj), local(self.down_proj)
        here_NK = chosen_NK - self.first
        token_P, slot_P = ((here_NK >= 0) & (here_NK < gate_up.shape[0])).nonzero(as_tuple=True)
        if len(token_P):
            here_P1, weight_P1 = here_NK[token_P, slot_P, None], weights_NK[token_P, slot_P, None]
        else:  # one pair that counts nothing: the weights must get a gradient all the same
            token_P = here_NK.new_zeros(1)
            here_P1, weight_P1 = here_NK.new_zeros(1, 1), weights_NK[:1, :1] * 0
        y_PD = run_experts(x_ND[token_P], here_P1, weight_P1.to(x_ND.dtype), gate_up, down)
        return sum_over(torch.zeros_like(x_ND).index_add(0, token_P, y_PD.to(x_ND.dtype)), self.group)


class PartlyUsedNorm(RMSNorm):
    """A replicated norm whose output each rank uses for its own heads: its weight's gradient is their sum."""

    group: ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to(self.weight, self.group)
        if x.dtype not in (torch.float32, torch.float64):
            return reference.rms_norm(x, weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def _cut(module: nn.Module, kind: type[nn.Module], mesh: DeviceMesh, **dims: int) -> None:
    """Makes `module` a `kind` that keeps, of each weight in `dims`, its rank's part along that dimension."""
    for name, dim in dims.items():
        whole = module._parameters[name]
        assert whole is not None
        part = distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None)
        module._parameters[name] = nn.Parameter(part, requires_grad=whole.requires_grad)
    module.__class__ = kind


# ---- modules ----------------------------------------------------------------------------------------------------
def _cut_attention(mla: MLA, mesh: DeviceMesh) -> None:
    group = mesh.get_group()
    heads = mla.config.num_attention_heads // mesh.size()
    mla.config = dataclasses.replace(mla.config, num_attention_heads=heads, num_key_value_heads=heads)
    mla.sum_heads = lambda x: total(x, group)
    _cut(mla.q_b_proj, CutLinear, mesh, weight=0)
    _cut(mla.kv_b_proj, CutLinear, mesh, weight=0)
    _cut(mla.o_proj, CutLinear, mesh, weight=1)
    _on_input(mla.q_b_proj, group)
    # Latents and rotary key enter the heads right after this projection, but for a norm and a rotation.
    mla.kv_a_proj_with_mqa.register_forward_hook(lambda module, args, y: copy_to(y, group))
    _cut(mla.kv_a_layernorm, PartlyUsedNorm, mesh)
    mla.kv_a_layernorm.group = group  # type: ignore[assignment]
    _on_output(mla.o_proj, group)


def _cut_mlp(mlp: MLP, mesh: DeviceMesh) -> None:
    _cut(mlp.gate_proj, CutLinear, mesh, weight=0)
    _cut(mlp.up_proj, CutLinear, mesh, weight=0)
    _cut(mlp.down_proj, CutLinear, mesh, weight=1)
    _on_input(mlp, mesh.get_group())
    _on_output(mlp, mesh.get_group())


def _cut_moe(moe: MoE, mesh: DeviceMesh) -> None:
    if type(moe.experts) is Experts:
        first = mesh.get_local_rank() * moe.experts.down_proj.shape[0] // mesh.size()
        _cut(moe.experts, CutExperts, mesh, gate_up_proj=0, down_proj=0)
        moe.experts.first, moe.experts.group = first, mesh.get_group()  # type: ignore[assignment]
    if moe.shared_experts is not None:
        _cut_mlp(moe.shared_experts, mesh)


def _cut_vocabulary(model: GLM5, mesh: DeviceMesh) -> None:
    group = mesh.get_group()
    embedding: Any = model.model.embed_tokens
    if embedding is not None:
        first = mesh.get_local_rank() * embedding.weight.shape[0] // mesh.size()
        _cut(embedding, CutEmbedding, mesh, weight=0)
        embedding.first, embedding.group = first, group
    if model.lm_head is not None:
        _cut(model.lm_head, CutLinear, mesh, weight=0)
        _on_input(model.lm_head, group)
        model.lm_head.register_forward_hook(lambda module, args, y: join(y, group))


def _on_input(module: nn.Module, group: ProcessGroup) -> None:
    module.register_forward_pre_hook(lambda module, args: (copy_to(args[0], group), *args[1:]))


def _on_output(module: nn.Module, group: ProcessGroup) -> None:
    module.register_forward_hook(lambda module, args, y: sum_over(y, group))
