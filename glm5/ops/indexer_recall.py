"""How well the lightning indexer finds what the main attention attends to, in blocks of queries.

p is the main attention's probabilities summed over heads (the target of `indexer_loss.py`). The true top-k are the k
keys with the largest p, the indexer's are those that `selection.select` gives. Two shares, per query:
- positions: how many of the true top-k the indexer selects;
- mass: the p of the indexer's k over the p of the true k; 1 means that no other k keys would keep more attention.

Only queries that see more than k keys count: the others select everything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm5.ops import reference
from glm5.ops.attention import BLOCK_BUDGET
from glm5.ops.indexer_loss import Index
from glm5.ops.precision import full_precision
from glm5.ops.selection import select
from glm5.ops.spans import Spans


@torch.no_grad()
def indexer_recall(
    q_BTHC: Tensor,
    latents_BSC: Tensor,
    scale: float,
    index: Index,
    spans: Spans,
    k: int,
    sum_heads: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions and mass, each a mean over the queries that see more than k keys, fp32 scalars; NaN without any.

    q_BTHC, latents_BSC: absorbed queries and latents of the main attention. sum_heads: adds the probabilities of heads
    that other processes hold.
    """
    wide = torch.promote_types(q_BTHC.dtype, torch.float32)
    selected_BTK = select(*index, spans, k)
    positions, mass = latents_BSC.new_zeros((), dtype=wide), latents_BSC.new_zeros((), dtype=wide)
    counted_BT = spans.hi_BT - spans.lo_BT > k
    step = max(1, BLOCK_BUDGET // (q_BTHC.shape[0] * q_BTHC.shape[2] * latents_BSC.shape[1]))
    with full_precision(q_BTHC):
        for i in range(0, q_BTHC.shape[1], step):
            part = slice(i, i + step)
            counted_BQ = counted_BT[:, part]
            if not bool(counted_BQ.any()):
                continue
            mask_BQS = reference.visible(spans.lo_BT[:, part], spans.hi_BT[:, part], latents_BSC.shape[1])
            scores_BHQS = torch.einsum("bqhc,bsc->bhqs", q_BTHC[:, part].to(wide), latents_BSC.to(wide)) * scale
            p_BQS = reference.masked_softmax(scores_BHQS, mask_BQS[:, None]).sum(1)
            p_BQS = p_BQS if sum_heads is None else sum_heads(p_BQS)
            p_QS, chosen_QS = p_BQS[counted_BQ], reference.chosen(selected_BTK[:, part], p_BQS.shape[-1])[counted_BQ]
            best = p_QS.topk(k, dim=-1)
            positions += chosen_QS.gather(1, best.indices).to(wide).mean(-1).sum()
            mass += ((p_QS * chosen_QS).sum(-1) / best.values.sum(-1)).sum()
    return positions / counted_BT.sum(), mass / counted_BT.sum()
