"""The truth: each hard operation written plainly, with T x S matrices and no thought of speed.

Every fast path in this room is compared with the function of the same name here. Keys that a query may see form an
interval `[lo, hi)` of positions (see `spans.py`): causality, packed segments and padding are all intervals.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / rms(x)` with the statistics in fp32 (or the input's own width, if wider)."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def visible(lo_BT: Tensor, hi_BT: Tensor, keys: int) -> Tensor:
    """Boolean [B, T, S]: may query t see key s?"""
    s = torch.arange(keys, device=lo_BT.device)
    return (s >= lo_BT[..., None]) & (s < hi_BT[..., None])


def chosen(selected_BTK: Tensor, keys: int) -> Tensor:
    """Boolean [B, T, S] of positions padded with -1: was key s selected by query t?"""
    mask = torch.zeros(*selected_BTK.shape[:2], keys + 1, dtype=torch.bool, device=selected_BTK.device)
    return mask.scatter_(-1, selected_BTK.masked_fill(selected_BTK < 0, keys), True)[..., :keys]


def index_scores(q_BTHI: Tensor, k_BSI: Tensor, w_BTH: Tensor) -> Tensor:
    """Lightning-indexer scores [B, T, S]: sum over heads of w * ReLU(q . k) (DeepSeek-V3.2 report, equation 1).

    The scales `index_head_dim ** -0.5` and `index_n_heads ** -0.5` are the caller's (in w).
    """
    return torch.einsum("bth,bths->bts", w_BTH, F.relu(torch.einsum("bthi,bsi->bths", q_BTHI, k_BSI)))


def select(scores_BTS: Tensor, lo_BT: Tensor, hi_BT: Tensor, k: int) -> Tensor:
    """Positions [B, T, K] of the k best visible keys, ascending, padded with -1; the lowest position wins a tie."""
    keys = scores_BTS.shape[-1]
    masked = scores_BTS.masked_fill(~visible(lo_BT, hi_BT, keys), float("-inf"))
    order = masked.sort(dim=-1, descending=True, stable=True)
    best, chosen = order.values[..., :k], order.indices[..., :k]
    chosen = chosen.masked_fill(best == float("-inf"), keys).sort(dim=-1).values
    chosen = F.pad(chosen, (0, k - chosen.shape[-1]), value=keys)
    return chosen.masked_fill(chosen == keys, -1)


def dense_attention(
    q_BTHN: Tensor, k_BSHN: Tensor, v_BSHV: Tensor, lo_BT: Tensor, hi_BT: Tensor, scale: float
) -> Tensor:
    """Softmax attention [B, T, H, V] over every visible key; rows that see nothing give zero."""
    mask_BTS = visible(lo_BT, hi_BT, k_BSHN.shape[1])
    return _attend(q_BTHN, k_BSHN, v_BSHV, mask_BTS, scale)


def sparse_attention(
    q_BTHC: Tensor, latents_BSC: Tensor, selected_BTK: Tensor, value_width: int, scale: float
) -> Tensor:
    """Absorbed MLA over the selected latents: keys are the rows, values their first `value_width` columns."""
    mask_BTS = chosen(selected_BTK, latents_BSC.shape[1])
    latents_BSHC = latents_BSC[:, :, None].expand(-1, -1, q_BTHC.shape[2], -1)
    return _attend(q_BTHC, latents_BSHC, latents_BSHC[..., :value_width], mask_BTS, scale)


def _attend(q_BTHN: Tensor, k_BSHN: Tensor, v_BSHV: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    scores_BHTS = torch.einsum("bthn,bshn->bhts", q_BTHN, k_BSHN).float() * scale
    if q_BTHN.dtype == torch.float64:
        scores_BHTS = torch.einsum("bthn,bshn->bhts", q_BTHN, k_BSHN) * scale
    p_BHTS = masked_softmax(scores_BHTS, mask_BTS[:, None])
    return torch.einsum("bhts,bshv->bthv", p_BHTS.to(v_BSHV.dtype), v_BSHV)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension of the entries where `mask` holds; a row without any gives zeros."""
    scores = scores.masked_fill(~mask, float("-inf"))
    empty = ~mask.any(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def indexer_kl(attention_BHTS: Tensor, scores_BTS: Tensor, mask_BTS: Tensor) -> Tensor:
    """KL(p || softmax(I)) per query, [B, T] (DeepSeek-V3.2 report, equations 3 and 4).

    p: attention probabilities summed over heads and normalised over the masked keys. Masked: every visible key in the
    dense warm-up stage, the selected keys in the sparse stage. Queries without keys give zero.
    """
    p = attention_BHTS.sum(1).masked_fill(~mask_BTS, 0.0)
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    empty = ~mask_BTS.any(-1, keepdim=True)
    scores = scores_BTS.masked_fill(~mask_BTS, float("-inf")).masked_fill(empty, 0.0)
    log_q = torch.log_softmax(scores, dim=-1).masked_fill(~mask_BTS, 0.0)
    return (torch.xlogy(p, p) - p * log_q).sum(-1)


def experts(x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> Tensor:
    """Weighted sum over the chosen experts of `down(silu(gate(x)) * up(x))`, one expert after another."""
    out_ND = torch.zeros_like(x_ND)
    for e in range(gate_up_E2ID.shape[0]):
        rows, slots = (chosen_NK == e).nonzero(as_tuple=True)
        if rows.numel():
            gate, up = F.linear(x_ND[rows], gate_up_E2ID[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, down_EDI[e]) * weights_NK[rows, slots, None]
            out_ND = out_ND.index_add(0, rows, y.to(out_ND.dtype))
    return out_ND
