"""Where the rows of a decoder's step lie in a cache: one code for paged pools and for contiguous rows.

A pool is rows of equal width in blocks of `page` slots. Position p of a sequence lies in slot
`table[p // page] * page + p % page`. A contiguous cache is a pool whose blocks are its rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from glm5.model.cache import LatentCache
from glm5.ops.decoding import Matrix, Sequences, Stored


class Slots:
    """The new rows of a step: for each its position, its slot and the blocks of its sequence.

    latents, keys: layer -> the slots of its pool. tables: the blocks of every sequence. rows:
    (sequence, position) of each new row; those of one sequence in order. A row sees its sequence up to itself.
    """

    def __init__(
        self,
        latents: Mapping[int, Stored],
        keys: Mapping[int, Stored],
        page: int,
        tables: Sequence[Sequence[int]],
        rows: Sequence[tuple[int, int]],
    ) -> None:
        self.latents, self.keys = latents, keys
        self._tables = [array("q", table) for table in tables]
        self.positions = [position for _, position in rows]
        self.longest = max(self.positions) + 1
        """Keys of the row that sees most."""
        where, self._new = array("q"), array("q")
        for sequence, position in rows:
            table = self._tables[sequence]
            where.extend((*table.buffer_info(), position + 1))
            self._new.append(table[position // page] * page + position % page)
        self.sequences = Sequences(where, page)
        self.new = Matrix(self._new.buffer_info()[0], 1, len(rows), len(rows))
        """The slot of every new row (int64)."""

    @classmethod
    def next_of(cls, cache: LatentCache) -> Slots:
        """One more token in every row of a contiguous cache."""
        rows = range(cache.batch)
        latents, keys = (
            {layer: Stored.of(rows_BSX) for layer, rows_BSX in pools.items()} for pools in (cache.latents, cache.keys)
        )
        return cls(latents, keys, cache.capacity, [[row] for row in rows], [(row, cache.length) for row in rows])
