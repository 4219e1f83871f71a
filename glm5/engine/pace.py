"""`Pace`: whether drafting pays, by the clock.

Drafts change no token, so whether to draft is a question of time alone, and time is what is measured: seconds per
sampled token of steps that draft and of steps that do not, apart for 1, 2-3, 4-7, ... decoding sequences, as running
means. The cheaper way is taken; in each period of `PERIOD` steps the other one is tried for `TRIES` steps. So drafting
stops where its acceptance does not pay: with few right guesses, in large batches, on machines where a row of a batch
costs as much as a step of its own, and where each row fetches other experts from a disk.
"""

from __future__ import annotations

PERIOD = 64
TRIES = 4
WEIGHT = 0.25
"""Of the newest measurement in a running mean."""


class Pace:
    """Chooses between drafting and not. `wanted` once for each step to come, `took` for each step that only decoded."""

    def __init__(self) -> None:
        self._cost: dict[tuple[int, bool], float] = {}
        self._measured: dict[tuple[int, bool], int] = {}
        self._steps: dict[int, int] = {}

    def wanted(self, sequences: int) -> bool:
        """Whether the next step, of so many decoding sequences, should verify drafts."""
        bucket = sequences.bit_length()
        step = self._steps[bucket] = self._steps.get(bucket, -1) + 1
        for drafting in (True, False):
            if self._measured.get((bucket, drafting), 0) < TRIES:
                return drafting
        pays = self._cost[bucket, True] < self._cost[bucket, False]
        return pays is not (step % PERIOD < TRIES)

    def took(self, drafting: bool, sequences: int, seconds: float, tokens: int) -> None:
        """A step of so many decoding sequences, all of which did or did not draft, sampled `tokens` tokens."""
        key, cost = (sequences.bit_length(), drafting), seconds / max(tokens, 1)
        self._cost[key] = cost if key not in self._cost else (1 - WEIGHT) * self._cost[key] + WEIGHT * cost
        self._measured[key] = self._measured.get(key, 0) + 1

    def seconds_per_token(self, drafting: bool, sequences: int) -> float | None:
        """The present mean, or None before the first measurement."""
        return self._cost.get((sequences.bit_length(), drafting))
