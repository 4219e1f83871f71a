"""How documents become rows of equal length: as arrays of pieces, computed once, before any token is read.

A document of n tokens has n - 1 positions that predict something. `cut` lays the positions of all documents end to end
and cuts every `length`: no padding, long documents continue in another row (without their past). `keep_whole` never
cuts: documents share a row while they fit and only those longer than a row lose their end; for chat data, where an
answer needs its question. Either way a segment id keeps documents in one row from seeing each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Pieces in the order of rows: piece p is `length[p]` positions of `document[p]` from `start[p]`."""

    document: Integers
    start: Integers
    length: Integers
    row_edges: Integers
    """Row r is the pieces row_edges[r] to row_edges[r + 1]."""

    @property
    def rows(self) -> int:
        return len(self.row_edges) - 1


def cut(positions: Integers, order: Integers, length: int, *, keep_rest: bool = False) -> Packing:
    """Rows of exactly `length` positions; the rest that fills no row is dropped, or is a shorter last row.

    positions: per document, its tokens less one. order: the documents in the order in which they are laid end to end.
    """
    ends = np.cumsum(positions[order])
    total = int(ends[-1]) if len(ends) else 0
    if not keep_rest:
        total -= total % length
    edges = np.unique(np.concatenate([np.arange(0, total, length), ends[ends < total], [total]]))
    starts = edges[:-1]
    place = np.searchsorted(ends, starts, side="right")
    row = starts // length
    return Packing(
        document=order[place],
        start=starts - (ends - positions[order])[place],
        length=np.diff(edges),
        row_edges=np.searchsorted(row, np.arange(int(row[-1]) + 2 if len(row) else 1)),
    )


def keep_whole(positions: Integers, order: Integers, length: int) -> Packing:
    """Rows of at most `length` positions that hold whole documents, in the given order, next fit."""
    kept = np.minimum(positions[order], length)
    row_edges, room = [0], length
    for piece, size in enumerate(kept.tolist()):
        if size > room:
            row_edges.append(piece)
            room = length
        room -= size
    if len(kept):
        row_edges.append(len(kept))
    return Packing(document=order, start=np.zeros_like(kept), length=kept, row_edges=np.array(row_edges))
