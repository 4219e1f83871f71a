"""Near duplicates: documents that share most of their sequences of five words.

MinHash signatures with locality-sensitive hashing (Broder 1997; Lee et al. 2022 for language models), by the `rensa`
library. A document is dropped when an earlier one's estimated Jaccard similarity reaches the threshold, so at most one
of any such pair is left, and none of it can stand on both sides of a split. The estimate has a standard deviation of
at most 1 / (2 sqrt(128)) = 0.045; pairs near the threshold may go either way, the same way in every run. Memory: about
1 kB a document, whatever its length.
"""

from __future__ import annotations

import importlib
from typing import Any

from glm5.errors import DataError

PERMUTATIONS = 128
SHINGLE = 5
SEED = 20260


class NearDuplicates:
    """Remembers the documents that were kept."""

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold < 1:
            raise DataError(f"near_duplicates is {threshold}; give a similarity between 0 and 1, such as 0.8.")
        try:
            self.rensa = importlib.import_module("rensa")
        except ImportError:
            raise DataError("rensa is not installed to find near duplicates; pip install glm5[data].") from None
        self.threshold = threshold
        self.index = self.rensa.RMinHashLSH(threshold, PERMUTATIONS, bands(threshold))
        self.kept: list[tuple[str, Any]] = []

    def earlier(self, text: str, name: str) -> str | None:
        """The name of an earlier near duplicate; when there is none, remembers the text and gives None."""
        signature = self.rensa.RMinHash(PERMUTATIONS, SEED)
        signature.update(shingles(text))
        for found in sorted(self.index.query(signature)):
            other, theirs = self.kept[found]
            if signature.jaccard(theirs) >= self.threshold:
                return other
        self.index.insert(len(self.kept), signature)
        self.kept.append((name, signature))
        return None


def shingles(text: str) -> list[str]:
    """The different sequences of five words, without case; a shorter text is one of its own."""
    words = text.casefold().split()
    return sorted({" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))})


def bands(threshold: float) -> int:
    """Bands of the index: the fewest (powers of two) that find pairs well below the threshold too.

    With b bands of r = 128 / b rows, a pair of similarity s is found with probability 1 - (1 - s^r)^b; its steep part
    lies near (1/b)^(1/r), which is kept 0.1 below the threshold.
    """
    for count in (4, 8, 16, 32, 64):
        if (1 / count) ** (count / PERMUTATIONS) <= threshold - 0.1:
            return count
    return PERMUTATIONS
