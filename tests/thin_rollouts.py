"""Rollouts out of thin air, for tests of the scheduler."""

from glm5.envs import Reward, Task
from glm5.rl.records import SCORED, Rollout, Trajectory
from glm5.rl.scheduler import Scheduler
from glm5.rl.scheduler_state import SchedulerState
from glm5.rl.tasks import TaskSource, TaskStream
from glm5.scoring import Grade

TASK = Task("t", ({"role": "user", "content": "?"},), "a", "one")


def rollout(ticket, versions=(0,), reward=None, outcome="ok"):
    """A finished rollout whose tokens have these versions; without a reward, sample number modulo 2."""
    n = len(versions)
    trajectory = Trajectory((7,) * (n + 1), (False,) + (True,) * n, (0.0,) + (-1.0,) * n, (-1, *versions))
    value = float(ticket.sample % 2) if reward is None else reward
    scored = Reward(value, Grade("correct" if value > 0 else "incorrect", "")) if outcome in SCORED else None
    return Rollout(ticket, TASK, (trajectory,) if n else (), outcome, scored)


def one_environment(**source):
    """An endless stream of `e`."""
    return TaskStream([TaskSource(environment="e", **source)])


def scheduler(config, **source):
    return Scheduler(config, one_environment(**source))


def fold(config, tasks, events, kind=SchedulerState):
    """What the journal alone says."""
    state = kind(config, tasks)
    for event in events:
        state.apply(event)
    return state
