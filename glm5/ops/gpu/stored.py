"""What the kernels read: the rows of a pool, and where in it the tokens of each sequence lie. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

GROUP = 64
"""Columns of an fp8 row that share a scale (`glm5/engine/pool.py`)."""


@dataclass(frozen=True)
class StoredRows:
    """Rows [X, W] of a pool: fp32, bf16, or bytes of e4m3 with scale bytes [X, groups]."""

    rows_XW: Tensor
    scales_XG: Tensor | None = None

    @property
    def scales(self) -> Tensor:
        """The scale bytes, or something that no kernel will read."""
        return self.rows_XW if self.scales_XG is None else self.scales_XG

    @property
    def groups(self) -> int:
        """Scale bytes of a row; 0 where there are none."""
        return 0 if self.scales_XG is None else self.scales_XG.shape[1]


@dataclass(frozen=True)
class Places:
    """Which keys each query sees, the positions [lo, hi) of its sequence, and where they lie: position p is in slot
    `table[p // page] * page + p % page`. All int64.

    tables_RB: blocks of each sequence, padded with any block. sequence_T: the number of each query's sequence.
    """

    tables_RB: Tensor
    page: int
    sequence_T: Tensor
    lo_T: Tensor
    hi_T: Tensor
    longest: int
    """At least every hi."""

    def part(self, queries: slice) -> Places:
        """Of some of the queries."""
        return replace(self, sequence_T=self.sequence_T[queries], lo_T=self.lo_T[queries], hi_T=self.hi_T[queries])

    def slots(self, at_TK: Tensor) -> Tensor:
        """Slots of positions of each query's sequence; -1 stays."""
        block_TK = self.tables_RB[self.sequence_T[:, None], at_TK.clamp_min(0) // self.page]
        return (block_TK * self.page + at_TK % self.page).masked_fill_(at_TK < 0, -1)
