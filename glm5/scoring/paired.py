"""Two answerers on the same questions: the difference of their accuracies, with an interval that uses the pairing.

Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions": the Wald interval of the
paired difference after half a count is added to each of the four cells. Sound for few or no disagreements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """`second - first`, a difference of shares, in [low, high] with the stated confidence."""

    value: float
    low: float
    high: float
    gained: int
    """Questions that only the second answers."""
    lost: int
    """Questions that only the first answers."""
    total: int

    def __str__(self) -> str:
        points = f"{self.value:+.1%} [{self.low:+.1%}, {self.high:+.1%}]"
        return f"{points} ({self.gained} gained, {self.lost} lost of {self.total})"


def paired_difference(first: Sequence[bool], second: Sequence[bool], *, confidence: float = 0.95) -> PairedDifference:
    """Compares right and wrong answers to the same questions in the same order; raises ValueError for other lengths."""
    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison takes two equal, non-empty lists; got {len(first)} and {len(second)}.")
    pairs = list(zip(first, second, strict=True))
    gained = sum(b and not a for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    total = len(pairs)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    n, up, down = total + 2, gained + 0.5, lost + 0.5
    centre = (up - down) / n
    half = z * math.sqrt(max(0.0, up + down - (up - down) ** 2 / n)) / n
    return PairedDifference(
        (gained - lost) / total, max(-1.0, centre - half), min(1.0, centre + half), gained, lost, total
    )
