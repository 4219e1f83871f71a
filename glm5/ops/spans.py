"""Which keys a query may see: an interval `[lo, hi)` of key positions per query.

Causal attention, packed rows (several documents in one row) and padding are all intervals, because a segment is a
contiguous run of tokens. So no mask of T x S is ever built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm5.errors import InputError


@dataclass(frozen=True)
class Spans:
    """The visible interval of every query, with the positions that drive the rotary embedding.

    lo_BT, hi_BT: int64, key interval (empty for padding). positions_BT: int64, position inside the segment.
    single: every row is one segment that starts at key 0 and has no padding (the fast paths ask this).
    start: absolute key index of the first query.
    """

    lo_BT: Tensor
    hi_BT: Tensor
    positions_BT: Tensor
    single: bool
    start: int

    @property
    def valid_BT(self) -> Tensor:
        """Boolean: the query is a real token."""
        return self.hi_BT > self.lo_BT


def plain_spans(batch: int, tokens: int, start: int, positions_BT: Tensor | None, device: torch.device) -> Spans:
    """One segment per row; the queries follow `start` keys that the cache already holds."""
    index_T = torch.arange(start, start + tokens, device=device)
    index_BT = index_T.expand(batch, tokens)
    lo_BT = torch.zeros_like(index_BT)
    positions_BT = index_BT if positions_BT is None else positions_BT
    return Spans(lo_BT, index_BT + 1, positions_BT, single=True, start=start)


def segment_spans(segments_BS: Tensor, tokens: int, positions_BT: Tensor | None) -> Spans:
    """Spans of the last `tokens` entries of rows whose entries carry segment ids (negative: padding).

    Raises InputError when a segment is not one contiguous run, because it would silently lose its first part.
    """
    keys = segments_BS.shape[1]
    index_S = torch.arange(keys, device=segments_BS.device)
    changes = torch.ones_like(segments_BS, dtype=torch.bool)
    changes[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
    _refuse_split_segments(segments_BS, changes)
    run_start_BS = torch.where(changes, index_S, 0).cummax(dim=1).values
    real_BS = segments_BS >= 0
    start = keys - tokens
    lo_BT = run_start_BS[:, start:]
    hi_BT = torch.where(real_BS, index_S + 1, run_start_BS)[:, start:]
    if positions_BT is None:
        positions_BT = (index_S - run_start_BS)[:, start:]
    return Spans(lo_BT, hi_BT, positions_BT, single=False, start=start)


def _refuse_split_segments(segments_BS: Tensor, changes_BS: Tensor) -> None:
    real_starts = changes_BS & (segments_BS >= 0)
    for row in range(segments_BS.shape[0]):
        starts = segments_BS[row][real_starts[row]]
        if starts.numel() != starts.unique().numel():
            raise InputError(
                f"segment_ids of row {row} use one id for two separate runs; give each packed document its own id "
                "and keep its tokens together."
            )
