"""Group-relative advantages: how much better a sample is than its siblings (GRPO, arXiv 2402.03300; GLM-5 report
3.2)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], *, normalise: bool = True) -> list[float] | None:
    """(R - mean) / std over the samples of one task, the std over the group itself; without `normalise` R - mean.

    None when all rewards are equal: such a group says nothing about which sample to prefer.
    """
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rewards must be finite, got {list(rewards)}")
    if len(set(rewards)) <= 1:
        return None
    mean = statistics.fmean(rewards)
    scale = statistics.pstdev(rewards) + EPSILON if normalise else 1.0
    return [(reward - mean) / scale for reward in rewards]
