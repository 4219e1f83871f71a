"""A share with its uncertainty: the Wilson score interval (E. B. Wilson 1927), sound for small counts and for 0%
and 100%."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

from glm5.scoring.grade import Grade


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`correct` of `total`, and the interval [low, high] that holds the true share with the stated confidence."""

    correct: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself; NaN when nothing was graded."""
        return self.correct / self.total if self.total else math.nan

    def __str__(self) -> str:
        if not self.total:
            return "no graded answer"
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.correct}/{self.total})"


def accuracy(grades: Iterable[Grade], *, confidence: float = 0.95) -> Accuracy:
    """The share of correct grades with its interval; an answer that was not attempted counts as not correct."""
    outcomes = [grade.correct for grade in grades]
    return proportion(sum(outcomes), len(outcomes), confidence=confidence)


def proportion(successes: int, total: int, *, confidence: float = 0.95) -> Accuracy:
    """`successes` of `total` with the Wilson interval; with a total of 0 the interval is [0, 1]."""
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} is no share.")
    if total == 0:
        return Accuracy(0, 0, 0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # At 0 and at `total` successes one end is exact; rounding must not move it inside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return Accuracy(successes, total, low, high)
