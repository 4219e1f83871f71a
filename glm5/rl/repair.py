"""Whether a group is learnt from when samples of it are missing (GLM-5 report, section 4.1.2), and whether it teaches.

A sample is missing when its environment failed, its time ran out, or it is too old. With strictly more than half of the
group left, the group is filled up by repeating what is left; with exactly half or less it is given up. The report does
not say which samples are repeated; here they are taken in sample order, round and round, until the group is full again.
A repeat is a weight: the sample is computed once and counts that often, in the baseline as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def enough(valid: int, group_size: int, repair: Literal["repeat", "never"]) -> bool:
    """Whether a group with `valid` samples left can be learnt from."""
    return 2 * valid > group_size if repair == "repeat" else valid == group_size


def repeated(valid: Sequence[int], group_size: int) -> tuple[tuple[int, int], ...]:
    """(sample, weight) of the valid samples, in sample order; the weights add up to `group_size`."""
    rounds, rest = divmod(group_size, len(valid))
    return tuple((sample, rounds + (place < rest)) for place, sample in enumerate(sorted(valid)))


def uniform(rewards: Sequence[float]) -> Literal["all right", "all wrong"] | None:
    """What a group whose rewards are all equal is called: it has no gradient under a group baseline.

    A single reward is not compared with anything, so it is never called uniform.
    """
    if len(rewards) < 2 or len(set(rewards)) > 1:
        return None
    return "all right" if rewards[0] > 0 else "all wrong"
