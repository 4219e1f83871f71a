"""Learning-rate schedules as plain functions of the step: warm-up from zero, then cosine, linear or constant.

GLM-5 report, appendix A: cosine in pre-training, linear in mid-training, constant in the sparse stage of DSA. A
schedule has no state, so a resumed run has nothing to restore.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from glm5.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The shape of the learning rate over a stage, as a fraction of the peak rate."""

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate goes from its peak, after the warm-up, to its end."""
    warmup_steps: int = 0
    """Steps of linear rise from 0 (exclusive) to the peak."""
    final_fraction: float = 0.0
    """The fraction of the peak that the last step has; `constant` ignores it."""

    def __post_init__(self) -> None:
        if self.shape not in ("cosine", "linear", "constant"):
            raise ConfigError(f"schedule shape is {self.shape!r}; use 'cosine', 'linear' or 'constant'.")
        if type(self.warmup_steps) is not int or self.warmup_steps < 0 or not 0 <= self.final_fraction <= 1:
            raise ConfigError("a schedule needs whole warmup_steps of at least 0 and final_fraction between 0 and 1.")


def rate_at(schedule: Schedule, step: int, steps: int) -> float:
    """The fraction of the peak learning rate at `step` (from 0) of a stage of `steps` steps."""
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.shape == "constant":
        return 1.0
    done = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
    decay = 1 - done if schedule.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.final_fraction + (1 - schedule.final_fraction) * decay
