"""Batch warm-up: the number of rows of a batch as a function of its step (GLM-5: 16M to 64M tokens).

The report ramps the batch over the first 500B tokens. Here the ramp is linear in steps and goes up in equal whole
steps: rows(s) = start + multiple * floor(levels * s / steps), levels = (full - start) / multiple. How many rows came
before a step is a sum over the levels, so no step needs the ones before it. Rows do not depend on the number of ranks;
any number of ranks that divides `multiple` and `start` may take over at any step.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm5.errors import DataError


@dataclass(frozen=True, kw_only=True)
class BatchWarmup:
    """From `start` rows a batch to the loader's full number within `steps` steps."""

    start: int
    steps: int
    multiple: int | None = None
    """By how many rows the batch grows at a time; None: by `start`."""

    def __post_init__(self) -> None:
        if self.start < 1 or self.steps < 1 or (self.multiple is not None and self.multiple < 1):
            raise DataError("a batch warm-up needs a start, a number of steps and a multiple of at least 1.")

    @property
    def unit(self) -> int:
        return self.start if self.multiple is None else self.multiple

    def levels(self, full: int) -> int:
        """How many times the batch grows. Raises DataError when `full` is not reached exactly."""
        if full < self.start or (full - self.start) % self.unit:
            raise DataError(
                f"a batch of {full} rows is not reached from {self.start} in steps of {self.unit}; "
                "choose rows = start + a multiple."
            )
        return (full - self.start) // self.unit

    def rows(self, step: int, full: int) -> int:
        """Rows of the global batch of `step`."""
        return self.start + self.unit * (self.levels(full) * min(step, self.steps) // self.steps)

    def before(self, step: int, full: int) -> int:
        """Rows of all batches before `step`."""
        levels = self.levels(full)
        reached = (-(-level * self.steps // levels) for level in range(1, levels + 1))  # first step of each level
        return step * self.start + self.unit * sum(max(0, step - first) for first in reached)
