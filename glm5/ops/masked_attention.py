"""Attention under a mask in bf16 on a CPU, forward and backward, one row of the batch after another.

PyTorch's fused CPU kernel turns a boolean mask into numbers at every call and multiplies small tiles; whole rows of
short contexts go through the library's bf16 products in about half its time. The formula is that of
`reference.dense_attention`. Scores are rounded to bf16 as in `sparse_attention.py`, the softmax is fp32, and what is
kept for the backward pass beside the inputs is P in bf16:

    dV = P^T dO,   dS = P (dP - sum P dP) scale,   dP = dO V^T,   dQ = dS K,   dK = dS^T Q

The caller (`attention.py`) chooses and bounds B x H x T x S. Left out: second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class MaskedAttention(torch.autograd.Function):
    """`apply(q_BTHN, k_BSHN, v_BSHV, mask_BTS, scale)` gives [B, T, H, V]. Inputs of one dtype.

    mask_BTS: boolean, true where a query sees a key; a query that sees none attends to all alike.
    """

    @staticmethod
    def forward(ctx: Any, q_BTHN: Tensor, k_BSHN: Tensor, v_BSHV: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
        q_BHTN, k_BHSN, v_BHSV = (x.transpose(1, 2).contiguous() for x in (q_BTHN, k_BSHN, v_BSHV))
        p_BHTS = q_BHTN.new_empty(*q_BHTN.shape[:3], k_BHSN.shape[2])
        out_BHTV = q_BHTN.new_empty(*q_BHTN.shape[:3], v_BHSV.shape[3])
        hidden_BTS = ~mask_BTS
        wide = torch.promote_types(q_BTHN.dtype, torch.float32)
        for b in range(q_BHTN.shape[0]):
            scores_HTS = torch.bmm(q_BHTN[b], k_BHSN[b].mT).to(wide).mul_(scale)
            scores_HTS.masked_fill_(hidden_BTS[b], torch.finfo(wide).min)
            p_BHTS[b] = torch.softmax(scores_HTS, dim=-1)
            torch.bmm(p_BHTS[b], v_BHSV[b], out=out_BHTV[b])
        ctx.save_for_backward(q_BHTN, k_BHSN, v_BHSV, p_BHTS)
        ctx.scale = scale
        return out_BHTV.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTN, k_BHSN, v_BHSV, p_BHTS = ctx.saved_tensors
        d_out_BHTV = d_out_BTHV.transpose(1, 2).contiguous()
        d_q_BHTN, d_k_BHSN, d_v_BHSV = (torch.empty_like(x) for x in (q_BHTN, k_BHSN, v_BHSV))
        for b, p_HTS in enumerate(p_BHTS):
            torch.bmm(p_HTS.mT, d_out_BHTV[b], out=d_v_BHSV[b])
            d_p_HTS = torch.bmm(d_out_BHTV[b], v_BHSV[b].mT)
            d_scores_HTS = torch.ops.aten._softmax_backward_data(d_p_HTS, p_HTS, -1, p_HTS.dtype).mul_(ctx.scale)
            torch.bmm(d_scores_HTS, k_BHSN[b], out=d_q_BHTN[b])
            torch.bmm(d_scores_HTS.mT, q_BHTN[b], out=d_k_BHSN[b])
        return d_q_BHTN.transpose(1, 2), d_k_BHSN.transpose(1, 2), d_v_BHSV.transpose(1, 2), None, None
