"""The records refuse what cannot be."""

import pytest

from glm5.envs import Reward, Task
from glm5.rl.records import Group, Lesson, Rollout, Ticket, Trajectory, Turn
from glm5.scoring import Grade

TASK = Task("t", ({"role": "user", "content": "?"},), "a", "one")
RIGHT = Reward(1.0, Grade("correct", "as asked"))


def trajectory(versions, first=2):
    n = len(versions)
    return Trajectory(
        tuple(range(first + n)), (False,) * first + (True,) * n, (0.0,) * first + (-1.0,) * n, (-1,) * first + versions
    )


def test_a_seed_belongs_to_one_turn_of_one_sample():
    tickets = [Ticket("e", 1), Ticket("e", 1, sample=1), Ticket("e", 1, attempt=1), Ticket("e", 2), Ticket("f", 1)]
    seeds = {ticket.seed(run, turn) for ticket in tickets for run in (0, 1) for turn in (0, 1)}
    assert len(seeds) == 20 and all(0 <= seed < 2**63 for seed in seeds)
    assert tickets[1].group == tickets[0] and tickets[2].group == tickets[2]


def test_staleness_is_that_of_the_oldest_token_of_all_trajectories():
    rollout = Rollout(Ticket("e", 0), TASK, (trajectory((5, 6)), trajectory((4, 9))), "ok", RIGHT)
    assert rollout.staleness(9) == 5 and rollout.num_sampled == 4
    assert Rollout(Ticket("e", 0), TASK, (), "aborted", None).staleness(9) == 0


@pytest.mark.parametrize("outcome", ["timeout", "env_failure", "aborted"])
def test_a_failure_is_never_a_score(outcome):
    with pytest.raises(ValueError, match=outcome):
        Rollout(Ticket("e", 0), TASK, (), outcome, RIGHT)
    with pytest.raises(ValueError, match="truncated"):
        Rollout(Ticket("e", 0), TASK, (), "truncated", None)


def test_the_parts_have_one_length():
    with pytest.raises(ValueError, match="2 output tokens"):
        Turn((1,), (2, 3), (0.0,), (0, 0), "stop")
    with pytest.raises(ValueError, match="different lengths"):
        Trajectory((1, 2), (False,), (0.0, 0.0), (-1, 0))
    with pytest.raises(ValueError, match="first token"):
        Trajectory((1,), (True,), (0.0,), (0,))


def test_a_repeat_counts_in_the_baseline():
    one = Lesson(Rollout(Ticket("e", 3, sample=1), TASK, (trajectory((0,)),), "ok", RIGHT), weight=2)
    group = Group((one,))
    assert group.rewards == [1.0, 1.0] and group.ticket == Ticket("e", 3)
