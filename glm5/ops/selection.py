"""The lightning indexer's selection without a T x S matrix: blocks of queries, blocks of keys, a running top-k.

`reference.index_scores` followed by `reference.select` is the truth. Three properties are kept in every block:
scores in fp32, the lowest position wins a tie, and a query sees its interval only. Nothing here is differentiable:
a selection has no gradient, and the indexer learns from `indexer_loss.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5.ops import lightning
from glm5.ops.spans import Spans

SCORE_BUDGET = 1 << 22
"""Elements of [heads, queries, keys] products alive at once: 16 MB in fp32, about an L3 cache."""
KEY_BLOCK = 8192


def choose(q_BTHI: Tensor, k_BSI: Tensor, w_BTH: Tensor, spans: Spans, k: int) -> Tensor | None:
    """`select`, or None where there are at most k keys: then every visible one is chosen."""
    return select(q_BTHI, k_BSI, w_BTH, spans, k) if k_BSI.shape[1] > k else None


@torch.no_grad()
def select(q_BTHI: Tensor, k_BSI: Tensor, w_BTH: Tensor, spans: Spans, k: int) -> Tensor:
    """Positions [B, T, K] of the k best keys of every query, ascending, -1 padded.

    q: indexer queries; k: indexer keys of the whole context; w: scaled head weights.
    """
    if torch.promote_types(q_BTHI.dtype, torch.float32) == torch.float32:
        q_BTHI, k_BSI, w_BTH = q_BTHI.float(), k_BSI.float(), w_BTH.float()
    cpu_fp32 = q_BTHI.device.type == "cpu" and q_BTHI.dtype == torch.float32
    one_row = lightning.select if cpu_fp32 and lightning.available() else _select_row
    inputs = (x.contiguous() for x in (q_BTHI, k_BSI, w_BTH, spans.lo_BT, spans.hi_BT))
    chosen = [one_row(q, keys, w, lo, hi, k) for q, keys, w, lo, hi in zip(*inputs, strict=True)]
    return chosen[0].unsqueeze(0) if len(chosen) == 1 else torch.stack(chosen)


def _select_row(q_THI: Tensor, k_SI: Tensor, w_TH: Tensor, lo_T: Tensor, hi_T: Tensor, k: int) -> Tensor:
    queries, heads = q_THI.shape[:2]
    step = max(1, SCORE_BUDGET // (heads * min(KEY_BLOCK, k_SI.shape[0])))
    chosen = [
        _select_block(q_THI[i : i + step], k_SI, w_TH[i : i + step], lo_T[i : i + step], hi_T[i : i + step], k)
        for i in range(0, queries, step)
    ]
    return torch.cat(chosen)


def _select_block(q_QHI: Tensor, k_SI: Tensor, w_QH: Tensor, lo_Q: Tensor, hi_Q: Tensor, k: int) -> Tensor:
    """Running top-k of one block of queries over the keys that any of them sees."""
    first, last = int(lo_Q.min()), int(hi_Q.max())
    best_QK = q_QHI.new_full((q_QHI.shape[0], 0), float("-inf"))
    at_QK = torch.empty_like(best_QK, dtype=torch.int64)
    for start, scores_QS in score_blocks(q_QHI, k_SI, w_QH, first, last):
        s = torch.arange(start, start + scores_QS.shape[1], device=k_SI.device)
        hidden = (s < lo_Q[:, None]) | (s >= hi_Q[:, None])
        scores_QS = scores_QS.masked_fill_(hidden, float("-inf"))
        values = torch.cat((best_QK, scores_QS), dim=1)
        places = torch.cat((at_QK, s.expand(scores_QS.shape[0], -1)), dim=1)
        best_QK, picked = stable_top_k(values, k)
        at_QK = places.gather(1, picked)
    end = k_SI.shape[0]
    at_QK = at_QK.masked_fill(best_QK == float("-inf"), end).sort(dim=1).values
    at_QK = F.pad(at_QK, (0, k - at_QK.shape[1]), value=end)
    return at_QK.masked_fill(at_QK == end, -1)


def score_blocks(q_QHI: Tensor, k_SI: Tensor, w_QH: Tensor, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
    """(start, scores [Q, block]) for the keys from `first` to `last`, one block of keys after another."""
    queries, heads, width = q_QHI.shape
    for start in range(first, last, KEY_BLOCK):
        keys = k_SI[start : min(start + KEY_BLOCK, last)]
        products = (q_QHI.reshape(queries * heads, width) @ keys.T).relu_()
        yield start, torch.bmm(w_QH[:, None], products.view(queries, heads, -1))[:, 0]


def stable_top_k(values_QS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, ascending by column; the lowest column wins a tie.

    `torch.topk` promises no order among equals, so the rows whose k-th value also stands outside the chosen set are
    chosen again by a stable sort. Such rows are rare: scores tie exactly only at ReLU zeros and masked entries.
    """
    k = min(k, values_QS.shape[1])
    values, columns = values_QS.topk(k, dim=1)
    last = values[:, -1:]
    tied = ((values_QS == last).sum(1) > (values == last).sum(1)) & (last[:, 0] > float("-inf"))
    if bool(tied.any()):
        rows = tied.nonzero()[:, 0]
        again = values_QS[rows].sort(dim=1, descending=True, stable=True)
        values[rows], columns[rows] = again.values[:, :k], again.indices[:, :k]
    columns, order = columns.sort(dim=1)
    return values.gather(1, order), columns


def top_positions(scores_TS: Tensor, k: int) -> Tensor:
    """Columns [T, K] of the k largest scores of each row, ascending, -1 padded; -inf is never chosen, the lowest column
    wins a tie. Without a wait for the device: which entries are chosen never decides what is launched.
    """
    tokens, keys = scores_TS.shape
    last_T1 = scores_TS.topk(min(k, keys), dim=1).values[:, -1:]
    better_TS = scores_TS > last_T1
    equal_TS = (scores_TS == last_T1) & (scores_TS > float("-inf"))
    room_T1 = k - better_TS.sum(1, keepdim=True)
    chosen_TS = better_TS | (equal_TS & (equal_TS.cumsum(1) <= room_T1))
    place_TS = chosen_TS.cumsum(1).sub_(1).masked_fill_(~chosen_TS, k)  # column k takes what nobody chose
    columns_TS = torch.arange(keys, device=scores_TS.device).expand(tokens, keys)
    return columns_TS.new_full((tokens, k + 1), -1).scatter_(1, place_TS, columns_TS)[:, :k]


def everything(spans: Spans, k: int) -> Tensor:
    """Positions [B, T, K] of all visible keys, ascending, -1 padded; for contexts of at most k keys."""
    at_BTK = spans.lo_BT[..., None] + torch.arange(k, device=spans.lo_BT.device)
    return at_BTK.masked_fill(at_BTK >= spans.hi_BT[..., None], -1)
