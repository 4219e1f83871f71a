"""The stateless loader: `batch = f(seed, step)`. Nothing to save, nothing to replay, any step can be computed again.

Documents are laid out in an order that the seed fixes and packed into rows once; each epoch visits the rows in an order
of its own. Row numbers run over the global batch, so a run goes on unchanged on another number of ranks: rank r of w
takes rows r, r + w, r + 2w, ... of each global batch. Orders come from a hash, not from a library's random generator,
whose stream may change between versions. Left out: mixing weights, other cuts in later epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm5.data.packing import Packing, cut, keep_whole
from glm5.data.shards import TokenDataset
from glm5.errors import DataError

IGNORED = -100
"""Target of a position that no loss counts."""


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, int64 [B, T] each."""

    input_ids_BT: Tensor
    targets_BT: Tensor
    """The token after each position, also where the row ends inside a document; `IGNORED` where nothing is learned."""
    segment_ids_BT: Tensor
    """0, 1, ... for the documents of a row; -1 is padding."""


class Loader:
    """Batches of a dataset for one rank.

    rows: rows of the global batch, a multiple of `world`. length: positions in a row. packing: see `glm5.data.packing`.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        rows: int,
        length: int,
        seed: int,
        packing: Literal["cut", "keep_whole"] = "cut",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if rows < 1 or rows % world or not 0 <= rank < world:
            raise DataError(f"{rows} rows a batch do not divide over {world} ranks; choose a multiple of {world}.")
        if length < 1:
            raise DataError(f"a row of {length} tokens holds nothing; give a length of at least 1.")
        order = shuffled(len(dataset), seed, 0)
        pack = cut if packing == "cut" else keep_whole
        self.packing = pack(dataset.lengths - 1, order, length)
        if self.packing.rows == 0:
            raise DataError(f"{dataset.directory} does not fill one row of {length}; give more text or a shorter row.")
        self.dataset, self.rows, self.length = dataset, rows, length
        self.seed, self.rank, self.world = seed, rank, world
        self._order: tuple[int, NDArray[np.int64]] = (-1, order)  # of the epoch used last; a cache, not a state

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step` (from 0)."""
        numbers = range(step * self.rows + self.rank, (step + 1) * self.rows, self.world)
        return assemble(self.dataset, self.packing, [self._row(number) for number in numbers], self.length)

    def _row(self, number: int) -> int:
        epoch, index = divmod(number, self.packing.rows)
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(self.packing.rows, self.seed, epoch + 1))
        return int(self._order[1][index])


def once(dataset: TokenDataset, *, rows: int, length: int, documents: int | None = None) -> Iterator[Batch]:
    """Every position of the dataset (or of its first `documents`) exactly once, in order."""
    count = len(dataset) if documents is None else min(documents, len(dataset))
    packing = cut(dataset.lengths - 1, np.arange(count), length, keep_rest=True)
    for first in range(0, packing.rows, rows):
        yield assemble(dataset, packing, range(first, min(first + rows, packing.rows)), length)


def assemble(dataset: TokenDataset, packing: Packing, rows: range | list[int], length: int) -> Batch:
    """The rows of a packing as tensors."""
    ids = np.zeros((len(rows), length), dtype=np.int64)
    targets = np.full_like(ids, IGNORED)
    segments = np.full_like(ids, -1)
    for i, row in enumerate(rows):
        at = 0
        pieces = range(int(packing.row_edges[row]), int(packing.row_edges[row + 1]))
        for segment, piece in enumerate(pieces):
            document, start = int(packing.document[piece]), int(packing.start[piece])
            end = at + int(packing.length[piece])
            tokens = dataset.ids(document, start, start + end - at + 1)
            learn = dataset.learn(document, start + 1, start + end - at + 1)
            ids[i, at:end] = tokens[:-1]
            targets[i, at:end] = np.where(learn, tokens[1:], IGNORED)
            segments[i, at:end] = segment
            at = end
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(segments))


def shuffled(count: int, seed: int, stream: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order that depends on (seed, stream) alone: sorted by SplitMix64."""
    x = np.arange(count, dtype=np.uint64) + np.uint64(_mix(_mix(seed) ^ stream))
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable").astype(np.int64)


def _mix(value: int) -> int:
    """One number's SplitMix64 hash."""
    mask = (1 << 64) - 1
    x = (value + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)
