"""Mixtures of datasets: which dataset gives row n of a run, in closed form.

The pattern of sources repeats after a period P (the common denominator of the weights, at most 10,000 rows) and is laid
out by the chairman assignment of Tijdeman (1980): row n goes to the source whose deadline is nearest among those that
are due. With K sources, every source k then has had n * w_k rows before row n, give or take 1 - 1/(2K - 2), so any
window of rows holds its share within 2 - 1/(K - 1) rows (one row for two sources). How many rows of a source came
before row n is a table look-up and a multiplication: nothing is replayed, and where each source stands is known at any
step.

A share may take long documents only; the same dataset again with another weight is how they are up-sampled. Left out:
weights that change within a run (a stage has one mixture; the next stage has its own).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glm5.data.shards import TokenDataset, open_dataset
from glm5.errors import DataError
from glm5.text import Tokenizer

LONGEST_PERIOD = 10_000
Packing = Literal["cut", "keep_whole"]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One dataset of a mixture."""

    path: Path
    """A dataset directory."""
    weight: float = 1.0
    """Rows of this share relative to the other shares' weights; at least 1 row in 10,000."""
    min_tokens: int = 0
    """Only documents of at least so many tokens."""
    packing: Packing | None = None
    """How documents become rows (`glm5.data.packing`); None: as the loader says."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"the weight of {self.path} is {self.weight}; give a number above 0, or leave it out.")
        if self.min_tokens < 0:
            raise DataError(f"min_tokens of {self.path} is {self.min_tokens}; give 0 or more.")


@dataclass(frozen=True)
class Mixture:
    """Datasets and their shares, in the same order; give it to `Loader` in place of a dataset."""

    shares: tuple[Share, ...]
    datasets: tuple[TokenDataset, ...]

    @property
    def sha256(self) -> str:
        """Identity of the contents and of the weights; that of the dataset when it is alone and whole."""
        if len(self.shares) == 1 and not self.shares[0].min_tokens:
            return self.datasets[0].sha256
        parts = [[d.sha256, s.weight, s.min_tokens, s.packing] for s, d in zip(self.shares, self.datasets, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_mixture(shares: Sequence[Share], tokenizer: Tokenizer | None = None) -> Mixture:
    """Opens every dataset, checked. Raises DataError for a damaged one, or one that `tokenizer` did not make."""
    if not shares:
        raise DataError("a mixture of no datasets gives no rows; name at least one.")
    opened: dict[Path, TokenDataset] = {}
    for share in shares:
        if share.path not in opened:
            opened[share.path] = open_dataset(share.path, tokenizer)
    makers = {dataset.manifest["tokenizer_sha256"] for dataset in opened.values()}
    if len(makers) > 1:
        names = ", ".join(map(str, opened))
        raise DataError(f"the datasets of one mixture were made with different tokenizers: {names}; tokenise again.")
    return Mixture(tuple(shares), tuple(opened[share.path] for share in shares))


@dataclass(frozen=True)
class Interleaving:
    """The source of every row, periodic."""

    source_P: NDArray[np.int64]
    before_PK: NDArray[np.int64]
    """Rows of each source before each row of the period; the last of the P + 1 lines is the whole period."""

    def at(self, row: int) -> tuple[int, int]:
        """The source of row `row` of the run, and how many rows of that source came before."""
        period, place = divmod(row, len(self.source_P))
        source = int(self.source_P[place])
        return source, period * int(self.before_PK[-1, source]) + int(self.before_PK[place, source])

    def counts(self, row: int) -> NDArray[np.int64]:
        """Rows of each source [K] before row `row`."""
        period, place = divmod(row, len(self.source_P))
        return np.asarray(period * self.before_PK[-1] + self.before_PK[place])


def interleave(weights: Sequence[float]) -> Interleaving:
    """The pattern for these weights. Weights whose common denominator is above 10,000 are rounded to 1/10,000."""
    quota = quotas(weights)
    sources, period = len(quota), sum(quota)
    slack = max(2 * sources - 2, 1)
    given, chosen = [0] * sources, []
    for row in range(period):
        owed = [slack * (quota[k] * (row + 1) - period * given[k]) for k in range(sources)]  # in 1/(slack period) rows
        due = [k for k in range(sources) if owed[k] >= period]
        nearest = min(due, key=lambda k: (period * (slack - 1) - owed[k]) / quota[k])
        given[nearest] += 1
        chosen.append(nearest)
    source_P = np.array(chosen, dtype=np.int64)
    one_hot_PK = source_P[:, None] == np.arange(sources)
    before_PK = np.concatenate([np.zeros((1, sources), dtype=np.int64), np.cumsum(one_hot_PK, axis=0)])
    return Interleaving(source_P, before_PK)


def quotas(weights: Sequence[float]) -> list[int]:
    """Rows of each source in a period: the weights as whole numbers, exact where the period stays below its limit."""
    exact = [Fraction(repr(float(weight))) for weight in weights]  # 0.7 is 7/10, not its nearest binary fraction
    parts = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= LONGEST_PERIOD:
        return [int(part * period) for part in parts]
    if min(parts) * LONGEST_PERIOD < 1:
        lowest = weights[parts.index(min(parts))]
        raise DataError(f"weight {lowest} is less than one row in {LONGEST_PERIOD:,}; raise it or leave the share out.")
    quota = [math.floor(part * LONGEST_PERIOD) for part in parts]
    largest_rest_first = sorted(range(len(parts)), key=lambda k: (quota[k] - parts[k] * LONGEST_PERIOD, k))
    for k in largest_rest_first[: LONGEST_PERIOD - sum(quota)]:
        quota[k] += 1
    return quota
