"""Attention over selected latents, forward and backward, in blocks of queries: the heart of a sparse training step.

The formula is that of `reference.sparse_attention`. Left to automatic differentiation, each block would keep or write
again what its slices are gradients of (zeros of the size of all gathered latents, and their sums); written out, a block
of the backward pass gathers once, and both of a latent's roles, key and value, are one product:

    dG = dS^T q + p^T [dO | 0],   dS = p (dP - sum p dP) scale,   dP = dO V^T,   dq = dS G

with G the gathered latents, V its first columns. Only the inputs are kept for the backward pass, whatever T is.
Left out: second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class SparseAttention(torch.autograd.Function):
    """`apply(q_BTHC, latents_BSC, selected_BTK, value_width, scale, queries)` gives [B, T, H, value_width].

    queries: of one block. Inputs of one dtype; scores and probabilities are fp32 (fp64 stays).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHC: Tensor,
        latents_BSC: Tensor,
        selected_BTK: Tensor,
        value_width: int,
        scale: float,
        queries: int,
    ) -> Tensor:
        ctx.save_for_backward(q_BTHC, latents_BSC, selected_BTK)
        ctx.value_width, ctx.scale, ctx.queries = value_width, scale, queries
        q_NHC, table_XC = q_BTHC.flatten(0, 1), latents_BSC.flatten(0, 1)
        rows_NK, missing_N1K = _rows(selected_BTK, latents_BSC.shape[1])
        out_NHV = q_NHC.new_empty(*q_NHC.shape[:2], value_width)
        for i in range(0, q_NHC.shape[0], queries):
            part = slice(i, i + queries)
            gathered_QKC = _gather(table_XC, rows_NK[part])
            p_QHK = _probabilities(q_NHC[part], gathered_QKC, missing_N1K[part], scale).to(q_NHC.dtype)
            torch.bmm(p_QHK, gathered_QKC[..., :value_width], out=out_NHV[part])
        return out_NHV.view(*q_BTHC.shape[:3], value_width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHC, latents_BSC, selected_BTK = ctx.saved_tensors
        width, value_width = latents_BSC.shape[-1], ctx.value_width
        q_NHC, table_XC, d_out_NHV = q_BTHC.flatten(0, 1), latents_BSC.flatten(0, 1), d_out_BTHV.flatten(0, 1)
        rows_NK, missing_N1K = _rows(selected_BTK, latents_BSC.shape[1])
        wide = torch.promote_types(table_XC.dtype, torch.float32)
        d_table_XC = torch.zeros_like(table_XC, dtype=wide)
        d_q_NHC = torch.empty_like(q_NHC)
        for i in range(0, q_NHC.shape[0], ctx.queries):
            part = slice(i, i + ctx.queries)
            q_QHC, d_out_QHV = q_NHC[part], d_out_NHV[part].to(q_NHC.dtype)
            gathered_QKC = _gather(table_XC, rows_NK[part])
            p_QHK = _probabilities(q_QHC, gathered_QKC, missing_N1K[part], ctx.scale)
            d_p_QHK = torch.bmm(d_out_QHV, gathered_QKC[..., :value_width].mT).to(wide)
            mean_QH1 = (p_QHK * d_p_QHK).sum(-1, keepdim=True)
            d_scores_QHK = ((d_p_QHK - mean_QH1) * p_QHK * ctx.scale).to(q_NHC.dtype)
            torch.bmm(d_scores_QHK, gathered_QKC, out=d_q_NHC[part])
            both_QXK = torch.cat((d_scores_QHK, p_QHK.to(q_NHC.dtype)), dim=1)
            times_QXC = torch.cat((q_QHC, F.pad(d_out_QHV, (0, width - value_width))), dim=1)
            d_gathered_QKC = torch.bmm(both_QXK.mT, times_QXC)
            d_table_XC.index_add_(0, rows_NK[part].flatten(), d_gathered_QKC.flatten(0, 1).to(wide))
        d_latents_BSC = d_table_XC.to(table_XC.dtype).view_as(latents_BSC)
        return d_q_NHC.view_as(q_BTHC), d_latents_BSC, None, None, None, None


def _rows(selected_BTK: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Rows [N, K] of the latents of all batch rows one after another, and which of them are padding [N, 1, K].

    Padding reads what the query chose first: its weight is zero, but zero times what lies elsewhere may be NaN.
    """
    start_B11 = torch.arange(selected_BTK.shape[0], device=selected_BTK.device)[:, None, None] * keys
    missing_BTK = selected_BTK < 0
    own_BTK = torch.where(missing_BTK, selected_BTK[..., :1].clamp_min(0), selected_BTK)
    return (own_BTK + start_B11).flatten(0, 1), missing_BTK.flatten(0, 1).unsqueeze(1)


def _gather(table_XC: Tensor, rows_QK: Tensor) -> Tensor:
    return table_XC.index_select(0, rows_QK.flatten()).view(*rows_QK.shape, -1)


def _probabilities(q_QHC: Tensor, gathered_QKC: Tensor, missing_Q1K: Tensor, scale: float) -> Tensor:
    """Softmax of the scaled scores in fp32 or wider; a query that selected nothing attends to nothing."""
    scores_QHK = torch.bmm(q_QHC, gathered_QKC.mT)
    wide = torch.promote_types(scores_QHK.dtype, torch.float32)
    scores_QHK = scores_QHK.to(wide).mul_(scale).masked_fill_(missing_Q1K, torch.finfo(wide).min)
    return torch.softmax(scores_QHK, dim=-1).masked_fill_(missing_Q1K, 0.0)
