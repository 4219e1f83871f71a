"""The stateless loader: `batch = f(seed, step)`. Nothing to save, nothing to replay, any step can be computed again.

Documents are laid out in an order that the seed fixes and packed into rows once; each epoch visits the rows in an order
of its own. Row numbers run over the global batch, so a run goes on unchanged on another number of ranks: rank r of w
takes rows r, r + w, r + 2w, ... of each global batch. Orders come from a hash, not from a library's random generator,
whose stream may change between versions.

A mixture gives row n of the run to a source by a closed form (`glm5.data.mixture`); every source has its own epochs.
The rows of one batch then change places by a hash of (seed, step), so that no rank is bound to one source. Left out:
other cuts in later epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm5.data.mixture import Mixture, Share, interleave
from glm5.data.packing import Packing, cut, keep_whole
from glm5.data.shards import TokenDataset
from glm5.data.warmup import BatchWarmup
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


class RowStream:
    """The rows of one dataset without end, epoch after epoch."""

    def __init__(self, dataset: TokenDataset, length: int, seed: int, packing: str, min_tokens: int = 0) -> None:
        order = shuffled(len(dataset), seed, 0)
        order = order[dataset.lengths[order] >= min_tokens]
        pack = cut if packing == "cut" else keep_whole
        self.packing: Packing = pack(np.maximum(dataset.lengths - 1, 0), order, length)
        if self.packing.rows == 0:
            chosen = f" in documents of at least {min_tokens} tokens" if min_tokens else ""
            raise DataError(
                f"{dataset.directory} does not fill one row of {length}{chosen}; give more text or a shorter row."
            )
        self.dataset, self.length, self.seed = dataset, length, seed
        self._orders: dict[int, NDArray[np.int64]] = {}  # of the epochs used last; a cache, not a state

    def row(self, number: int) -> int:
        """Which row of the packing comes as number `number` (from 0) of this stream."""
        epoch, index = divmod(number, self.packing.rows)
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a batch may reach over the end of an epoch
                del self._orders[min(self._orders)]
            self._orders[epoch] = shuffled(self.packing.rows, self.seed, epoch + 1)
        return int(self._orders[epoch][index])


class Loader:
    """Batches of a dataset, or of a mixture of datasets, for one rank.

    rows: rows of the global batch, a multiple of `world`; with `warmup` of the batches after it. length: positions in a
    row. packing: see `glm5.data.packing`; a share of a mixture may say otherwise.
    """

    def __init__(
        self,
        data: TokenDataset | Mixture,
        *,
        rows: int,
        length: int,
        seed: int,
        packing: Literal["cut", "keep_whole"] = "cut",
        rank: int = 0,
        world: int = 1,
        warmup: BatchWarmup | None = None,
    ) -> None:
        if rows < 1 or rows % world or not 0 <= rank < world:
            raise DataError(f"{rows} rows a batch do not divide over {world} ranks; choose a multiple of {world}.")
        if warmup is not None and (warmup.start % world or (warmup.levels(rows) and warmup.unit % world)):
            raise DataError(
                f"a warm-up from {warmup.start} rows in steps of {warmup.unit} does not divide over {world} ranks; "
                f"choose multiples of {world}."
            )
        if length < 1:
            raise DataError(f"a row of {length} tokens holds nothing; give a length of at least 1.")
        if isinstance(data, TokenDataset):
            data = Mixture((Share(path=data.directory),), (data,))
        self.streams = tuple(
            RowStream(dataset, length, seed_of(seed, k), share.packing or packing, share.min_tokens)
            for k, (share, dataset) in enumerate(zip(data.shares, data.datasets, strict=True))
        )
        self.interleaving = interleave([share.weight for share in data.shares])
        self.data, self.rows, self.length, self.warmup = data, rows, length, warmup
        self.seed, self.rank, self.world = seed, rank, world

    def rows_at(self, step: int) -> int:
        """Rows of the global batch of `step`."""
        return self.rows if self.warmup is None else self.warmup.rows(step, self.rows)

    def rows_before(self, step: int) -> int:
        """Rows of all global batches before `step`."""
        return step * self.rows if self.warmup is None else self.warmup.before(step, self.rows)

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step` (from 0)."""
        rows = self.plan(step)[self.rank :: self.world]
        return assemble([(self.streams[k].dataset, self.streams[k].packing, row) for k, row in rows], self.length)

    def plan(self, step: int) -> list[tuple[int, int]]:
        """(number of the share, row of its packing) of every row of the global batch of `step`."""
        first, rows = self.rows_before(step), self.rows_at(step)
        numbers: Sequence[int] = range(first, first + rows)
        if len(self.streams) > 1:
            numbers = [first + place for place in shuffled(rows, mix(self.seed + 1), step).tolist()]
        found = (self.interleaving.at(number) for number in numbers)
        return [(k, self.streams[k].row(index)) for k, index in found]

    def epochs(self, step: int) -> list[float]:
        """How often each share of the mixture has been seen before `step`."""
        counts = self.interleaving.counts(self.rows_before(step)).tolist()
        return [count / stream.packing.rows for count, stream in zip(counts, self.streams, strict=True)]


def once(dataset: TokenDataset, *, rows: int, length: int, documents: int | None = None) -> Iterator[Batch]:
    """Every position of the dataset (or of its first `documents`) exactly once, in order."""
    count = len(dataset) if documents is None else min(documents, len(dataset))
    packing = cut(dataset.lengths - 1, np.arange(count), length, keep_rest=True)
    for first in range(0, packing.rows, rows):
        numbers = range(first, min(first + rows, packing.rows))
        yield assemble([(dataset, packing, row) for row in numbers], length)


def assemble(rows: Sequence[tuple[TokenDataset, Packing, int]], length: int) -> Batch:
    """Rows, each of a packing of a dataset, as tensors."""
    ids = np.zeros((len(rows), length), dtype=np.int64)
    targets = np.full_like(ids, IGNORED)
    segments = np.full_like(ids, -1)
    for i, (dataset, packing, row) in enumerate(rows):
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
    x = np.arange(count, dtype=np.uint64) + np.uint64(mix(mix(seed) ^ stream))
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable").astype(np.int64)


def seed_of(seed: int, share: int) -> int:
    """The seed of a share of a mixture; the first one keeps the loader's."""
    return mix(mix(seed) ^ share) if share else seed


def mix(value: int) -> int:
    """One number's SplitMix64 hash."""
    mask = (1 << 64) - 1
    x = (value + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)
