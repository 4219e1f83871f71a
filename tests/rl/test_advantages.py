"""Baselines are over rollouts, repeats count, and each kind is its formula."""

import functools
import math
import operator
import statistics

import pytest
from learning import rollout_of

from glm5.rl.advantages import group_advantages, rollout_advantages
from glm5.rl.packing import token_shares
from glm5.rl.records import Group, Lesson, Ticket, Trajectory


def trajectory(length):
    return Trajectory((1,) * (length + 1), (False,) + (True,) * length, (0.0,) * (length + 1), (-1,) + (0,) * length)


def group(index, rewards, weights=None, lengths=None):
    rollouts = [
        rollout_of(Ticket("toy", index, sample=i), [trajectory(n)], r)
        for i, (r, n) in enumerate(zip(rewards, lengths or [1] * len(rewards), strict=True))
    ]
    return Group(tuple(Lesson(r, w) for r, w in zip(rollouts, weights or [1] * len(rewards), strict=True)))


def test_the_kinds_on_two_groups():
    groups = [group(0, [1.0, 0.0, 0.0]), group(1, [2.0, 1.0])]
    third = 1 / 3
    assert rollout_advantages(groups, "dr-grpo") == [pytest.approx([2 * third, -third, -third]), [0.5, -0.5]]
    assert rollout_advantages(groups, "grpo")[1] == pytest.approx([1.0, -1.0], rel=1e-5)
    assert rollout_advantages(groups, "rloo") == [[1.0, -0.5, -0.5], [1.0, -1.0]]
    assert rollout_advantages(groups, "reward") == [[1.0, 0.0, 0.0], [2.0, 1.0]]
    assert rollout_advantages(groups, "none") == rollout_advantages(groups, "gae") == [[0.0] * 3, [0.0] * 2]
    everything = [1.0, 0.0, 0.0, 2.0, 1.0]
    deviation = statistics.pstdev(everything)
    assert functools.reduce(operator.iadd, rollout_advantages(groups, "reinforce++"), []) == pytest.approx(
        [(r - 0.8) / deviation for r in everything], rel=1e-5
    )
    centred = [2 * third, -third, -third, 0.5, -0.5]
    size = math.sqrt(statistics.fmean(x * x for x in centred))
    assert functools.reduce(operator.iadd, rollout_advantages(groups, "reinforce++-baseline"), []) == pytest.approx(
        [x / size for x in centred], rel=1e-5
    )


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "reinforce++", "reinforce++-baseline"])
def test_a_repeat_counts_as_if_it_were_written_out(kind):
    one = rollout_advantages([group(0, [1.0, 0.0], [3, 1]), group(1, [0.0, 4.0])], kind)
    other = rollout_advantages([group(0, [1.0, 1.0, 1.0, 0.0]), group(1, [0.0, 4.0])], kind)
    assert one[0] == pytest.approx([other[0][0], other[0][3]]) and one[1] == pytest.approx(other[1])


def test_a_repeated_rollout_is_not_its_own_baseline():
    [found] = rollout_advantages([group(0, [1.0, 0.0], [3, 1])], "rloo")
    assert found == [1.0, -1.0]
    assert rollout_advantages([group(0, [1.0], [4])], "rloo") == [[0.0]]


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "rloo", "reinforce++", "reinforce++-baseline"])
def test_equal_rewards_say_nothing(kind):
    assert rollout_advantages([group(0, [1.0, 1.0, 1.0])], kind) == [[0.0] * 3]


def test_rewards_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="toy/0/0/1 has the reward"):
        rollout_advantages([group(0, [1.0, math.nan])], "grpo")
    with pytest.raises(ValueError, match="finite"):
        group_advantages([math.nan, 1.0])


def test_the_shares_of_the_three_normalisations():
    lessons = group(0, [0.0, 1.0], weights=[1, 3], lengths=[10, 2]).lessons
    assert token_shares(lessons, "sequence-mean", 8) == pytest.approx([1 / 40, 3 / 8])
    assert token_shares(lessons, "token-mean", 8) == pytest.approx([1 / 16, 3 / 16])
    assert token_shares(lessons, "fixed-length", 8) == pytest.approx([1 / 32, 3 / 32])
