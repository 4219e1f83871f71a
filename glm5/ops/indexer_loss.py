"""What the lightning indexer learns from: KL of its scores to the main attention, in blocks of queries.

p is the main attention's probabilities summed over heads and normalised (detached: a target), q the softmax of the
index scores, over all visible keys in the warm-up stage and over the selected keys in the sparse stage
(DeepSeek-V3.2 report, equations 3 and 4). `reference.indexer_kl` is the truth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glm5.ops import reference
from glm5.ops.attention import BLOCK_BUDGET, gather_latents
from glm5.ops.precision import full_precision
from glm5.ops.spans import Spans

Index = tuple[Tensor, Tensor, Tensor]
"""What the indexer computed: queries [B, T, H, I], keys [B, S, I], scaled head weights [B, T, H]."""


def indexer_kl(
    q_BTHC: Tensor, latents_BSC: Tensor, scale: float, index: Index, spans: Spans, selected_BTK: Tensor | None,
    sum_heads: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Mean KL over the real queries, a scalar in fp32; over every visible key when `selected_BTK` is None.

    q_BTHC, latents_BSC: absorbed queries and latents of the main attention; no gradient goes into them.
    sum_heads: adds the probabilities of heads that other processes hold.
    """
    with full_precision(q_BTHC):
        return _indexer_kl(q_BTHC, latents_BSC, scale, index, spans, selected_BTK, sum_heads)


def _indexer_kl(
    q_BTHC: Tensor, latents_BSC: Tensor, scale: float, index: Index, spans: Spans, selected_BTK: Tensor | None,
    sum_heads: Callable[[Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(q_BTHC.dtype, torch.float32)
    q_BTHC, latents_BSC = q_BTHC.detach().to(wide), latents_BSC.detach().to(wide)
    iq_BTHI, ik_BSI, iw_BTH = (part.to(wide) for part in index)
    keys = latents_BSC.shape[1] if selected_BTK is None else selected_BTK.shape[2]
    heads = max(q_BTHC.shape[2] + iq_BTHI.shape[2], latents_BSC.shape[2] if selected_BTK is not None else 0)
    step = max(1, BLOCK_BUDGET // (q_BTHC.shape[0] * heads * keys))
    total = latents_BSC.new_zeros(())
    for i in range(0, q_BTHC.shape[1], step):
        part = slice(i, i + step)
        chosen = None if selected_BTK is None else selected_BTK[:, part]
        inputs = (q_BTHC[:, part], latents_BSC, scale, iq_BTHI[:, part], ik_BSI, iw_BTH[:, part],
                  spans.lo_BT[:, part], spans.hi_BT[:, part], chosen, sum_heads)  # fmt: skip
        several = q_BTHC.shape[1] > step and torch.is_grad_enabled()
        total = total + (checkpoint(_block, *inputs, use_reentrant=False) if several else _block(*inputs))
    return total / spans.valid_BT.sum().clamp_min(1)


def _block(
    q_BQHC: Tensor, latents_BSC: Tensor, scale: float, iq_BQHI: Tensor, ik_BSI: Tensor, iw_BQH: Tensor,
    lo_BQ: Tensor, hi_BQ: Tensor, selected_BQK: Tensor | None, sum_heads: Callable[[Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    """Summed KL of one block of queries."""
    if selected_BQK is None:
        mask = reference.visible(lo_BQ, hi_BQ, latents_BSC.shape[1])
        attention = torch.einsum("bqhc,bsc->bhqs", q_BQHC, latents_BSC)
        scores = reference.index_scores(iq_BQHI, ik_BSI, iw_BQH)
    else:
        mask = selected_BQK >= 0
        attention = torch.einsum("bqhc,bqkc->bhqk", q_BQHC, gather_latents(latents_BSC, selected_BQK))
        products = torch.einsum("bqhi,bqki->bqhk", iq_BQHI, gather_latents(ik_BSI, selected_BQK)).relu()
        scores = torch.einsum("bqh,bqhk->bqk", iw_BQH, products)
    p_BHQS = reference.masked_softmax(attention * scale, mask[:, None])
    if sum_heads is not None:
        p_BHQS = sum_heads(p_BHQS.sum(1, keepdim=True))
    return reference.indexer_kl(p_BHQS, scores, mask).sum()
