"""Advantages of whole rollouts: how much better one is than its siblings, or than the batch.

A baseline is always taken over the *rollouts* of a task: an episode of many turns, or one that splits into several
trajectories, counts once, and a rollout that stands for several in a repaired group counts as often as it weighs.

| kind | advantage | source |
|---|---|---|
| grpo | (R - mean) / std of the group | arXiv 2402.03300; GLM-5 report 3.2, reasoning RL |
| dr-grpo | R - mean of the group | arXiv 2503.20783; GLM-5 report 3.3, agentic RL |
| rloo | R - mean of the other rollouts of the group | arXiv 2402.14740 |
| reinforce++ | (R - mean) / std of the batch | arXiv 2501.03262 |
| reinforce++-baseline | (R - mean of the group) / std of that over the batch | the same, for groups |
| reward | R | Williams 1992 |
| gae | of each token, by a critic (`critic.py`); here 0 | arXiv 1506.02438 |
| none | 0; what remains is distillation or a penalty | |

A group whose rewards are all equal has advantages of 0 in the kinds that look at the group alone. Token-level
advantages (critic, distillation, a KL penalty) need the model and are added elsewhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from glm5.rl.records import Group

Advantages = Literal["grpo", "dr-grpo", "rloo", "reinforce++", "reinforce++-baseline", "reward", "gae", "none"]
KINDS: tuple[Advantages, ...] = (
    "grpo", "dr-grpo", "rloo", "reinforce++", "reinforce++-baseline", "reward", "gae", "none",
)  # fmt: skip
AGAINST_GROUP = frozenset[Advantages]({"grpo", "dr-grpo", "rloo", "reinforce++-baseline"})
"""Those that are 0 in a group of one."""
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


def rollout_advantages(groups: Sequence[Group], kind: Advantages) -> list[list[float]]:
    """The advantage of every lesson, group by group."""
    rewards = [_lesson_rewards(group) for group in groups]
    weights = [[lesson.weight for lesson in group.lessons] for group in groups]
    if kind in ("gae", "none"):
        return [[0.0] * len(values) for values in rewards]
    if kind == "reward":
        return rewards
    if kind == "reinforce++":
        return _standardised(rewards, weights, centre=True)
    if kind == "reinforce++-baseline":
        return _standardised(
            [_within(r, w, normalise=False) for r, w in zip(rewards, weights, strict=True)], weights, centre=False
        )
    if kind == "rloo":
        return [_leave_one_out(r, w) for r, w in zip(rewards, weights, strict=True)]
    return [_within(r, w, normalise=kind == "grpo") for r, w in zip(rewards, weights, strict=True)]


def _lesson_rewards(group: Group) -> list[float]:
    """One for each lesson, repeats not written out."""
    found = []
    for lesson in group.lessons:
        reward = lesson.rollout.reward
        if reward is None or not math.isfinite(reward.value):
            raise ValueError(f"rollout {lesson.rollout.id} has the reward {reward}; it cannot be learnt from")
        found.append(reward.value)
    return found


def _within(rewards: list[float], weights: list[int], *, normalise: bool) -> list[float]:
    """Against the group: `group_advantages` with the repeats written out."""
    repeated = [reward for reward, weight in zip(rewards, weights, strict=True) for _ in range(weight)]
    found = group_advantages(repeated, normalise=normalise)
    if found is None:
        return [0.0] * len(rewards)
    starts = [sum(weights[:i]) for i in range(len(weights))]
    return [found[start] for start in starts]


def _leave_one_out(rewards: list[float], weights: list[int]) -> list[float]:
    """Against the other rollouts: all copies of a repeated one are left out, or it would be its own baseline."""
    total, count = sum(r * w for r, w in zip(rewards, weights, strict=True)), sum(weights)
    return [
        r - (total - r * w) / (count - w) if count > w else 0.0 for r, w in zip(rewards, weights, strict=True)
    ]  # fmt: skip


def _standardised(values: list[list[float]], weights: list[list[int]], *, centre: bool) -> list[list[float]]:
    """Over the whole batch, repeats counted; 0 everywhere when all values are equal."""
    flat = [
        value
        for some, counts in zip(values, weights, strict=True)
        for value, count in zip(some, counts, strict=True)
        for _ in range(count)
    ]
    if len(set(flat)) <= 1:
        return [[0.0] * len(some) for some in values]
    mean = statistics.fmean(flat) if centre else 0.0
    scale = statistics.pstdev(flat) + EPSILON if centre else math.sqrt(statistics.fmean(v * v for v in flat)) + EPSILON
    return [[(value - mean) / scale for value in some] for some in values]
