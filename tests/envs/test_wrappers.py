"""Delays that repeat themselves, and episodes that are begun again."""

import asyncio
import statistics

import pytest
from episodes import assert_pure, play, said

from glm5.envs import (
    Counting,
    Delayed,
    Environment,
    EnvironmentFailure,
    GymEnvironment,
    Latency,
    Retried,
    SingleTurn,
    Sums,
    calculator_environment,
)
from glm5.errors import ConfigError


class Slept:
    """Time that passes at once."""

    def __init__(self):
        self.seconds = []

    async def __call__(self, seconds):
        self.seconds.append(seconds)
        await asyncio.sleep(0)


def test_latencies_lie_between_their_bounds_and_repeat():
    latency = Latency(0.05, 0.5)
    drawn = [latency.seconds(str(i)) for i in range(500)]
    assert 0.05 <= min(drawn) < 0.06 and 0.45 < max(drawn) <= 0.5
    assert 0.13 < statistics.median(drawn) < 0.19  # the geometric middle of the bounds is 0.158
    assert drawn == [latency.seconds(str(i)) for i in range(500)]
    assert drawn != [Latency(0.05, 0.5, seed=1).seconds(str(i)) for i in range(500)]
    with pytest.raises(ConfigError, match="0 < low"):
        Latency(0.5, 0.05)


def test_a_rollout_that_is_repeated_waits_as_long():
    def waits(*messages):
        slept = Slept()
        env: Environment = Delayed(calculator_environment(), sleep=slept)
        play(env, env.task(0, 0), *messages)
        return slept.seconds

    call = said("", ("calculator", '{"a": 1, "operation": "plus", "b": 1}'))
    first = waits(call, said("2"))
    assert len(first) == 2 and first == waits(call, said("2"))
    other = waits(call, said("3"))
    assert other[0] == first[0] and other[1] != first[1]


def test_a_delayed_environment_is_the_same_otherwise():
    plain = calculator_environment()
    delayed = Delayed(plain, sleep=Slept())
    assert_pure(delayed)
    assert (delayed.name, delayed.limits, delayed.uniform_groups) == (plain.name, plain.limits, plain.uniform_groups)
    task = plain.task(0, 0)
    assert delayed.task(0, 0) == task and delayed.episode(task).tools == plain.episode(task).tools
    assert play(delayed, task, said(task.answer)) == play(plain, task, said(task.answer))


class Flaky:
    """Fails at the first `fails` resets of all its episodes."""

    fails = closed = 0

    def reset(self, *, seed):
        if Flaky.fails > 0:
            Flaky.fails -= 1
            raise OSError("not yet")
        return "ready", {}

    def step(self, action):
        raise OSError("never")

    def close(self):
        Flaky.closed += 1


def test_a_reset_is_tried_again_with_a_new_episode():
    slept = Slept()
    env: Environment = Retried(GymEnvironment("flaky", Flaky), tries=3, wait=0.5, sleep=slept)
    Flaky.fails, Flaky.closed = 2, 0
    assert play(env, env.task(0, 0))[0][0].messages[0]["content"] == "ready"
    assert slept.seconds == [0.5, 1.0] and Flaky.closed == 3
    Flaky.fails = 3
    with pytest.raises(EnvironmentFailure, match="not yet"):
        play(env, env.task(0, 0))
    with pytest.raises(ConfigError):
        Retried(SingleTurn(Sums()), tries=0)


def test_a_step_is_never_sent_twice():
    slept = Slept()
    env = Retried(GymEnvironment("flaky", Flaky), sleep=slept)
    Flaky.fails = 0
    with pytest.raises(EnvironmentFailure, match="never"):
        play(env, env.task(0, 0), said("x"))
    assert not slept.seconds


def test_counting_has_a_long_tail_and_partial_rewards():
    env = SingleTurn(Counting(median=6, largest=10_000))
    assert_pure(env)
    lengths = sorted(len(env.task(0, i).answer.split()) for i in range(2000))
    assert lengths[1000] in (5, 6, 7) and lengths[1980] > 10 * lengths[1000]
    task = next(task for task in (env.task(0, i) for i in range(50)) if task.answer == "1 2 3 4")
    value = lambda text: play(env, task, said(text))[1].value
    assert [value(text) for text in ("1 2 3 4", "1, 2, 3, 4.", "1 2", "1 2 4 3", "", "2", "1 2 3 4 5 6 7 8")] == [
        1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.5,
    ]  # fmt: skip
