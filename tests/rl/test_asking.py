"""Environments that are slow, hung, broken, or other than the protocol says: each costs its sample and nothing else."""

import asyncio
import json
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
from scripted import Chat, ChatEpisode, ScriptedSource

from glm5.envs import EpisodeLimits, Observation, Reward, Task, single_questions
from glm5.errors import ConfigError
from glm5.rl import episode_task
from glm5.rl.codec import rollout_from_json, rollout_to_json
from glm5.rl.records import Ticket
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.scoring import Grade

TICKET = Ticket("chat", 3, sample=1)
QUESTION = {"role": "user", "content": "And then?"}


def rollout_of(environment, source, config=None, **options):
    config = config or RolloutConfig(thinking=True)
    return asyncio.run(play(TICKET, environment, source, config, **options))


GRADE = Grade("correct", "said")


class Wrong(Chat):
    """A chat of two answers whose method `what` gives something else."""

    def __init__(self, what, give, **options):
        super().__init__(QUESTION, **options)
        self.what, self.give = what, give

    def task(self, seed, index):
        return self.give() if self.what == "task" else super().task(seed, index)

    def episode(self, task):
        episode = self.give() if self.what == "episode" else ChatEpisode(self, task)
        if self.what not in ("task", "episode"):
            setattr(episode, self.what, self.give if self.what != "tools" else self.give())
        return episode


def coroutine(value):
    async def method(*_):
        return value

    return method


async def cancelling(*_):
    raise asyncio.CancelledError


def said(**changes):
    return coroutine(Observation(({"role": "user", "content": "x", **changes},)))


ENDLESS = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("what", "give", "reason"),
    [
        ("task", lambda: None, "crash: task is None, not Task"),
        ("task", lambda: Task(object(), (), "", ""), "crash: task holds what is no JSON: Object of type object"),
        ("task", lambda: Task("a", ({"role": "user", "content": {1}},), "", ""), "crash: task holds what is no JSON"),
        ("task", lambda: Task("a", ("hello",), "", ""), "crash: a message of task is of type str, not dict"),
        ("task", lambda: Task("a", None, "", ""), "crash: task: TypeError"),
        ("episode", lambda: None, "crash: tools: AttributeError"),
        ("tools", lambda: None, "crash: tools: TypeError"),
        ("tools", lambda: [3], "crash: messages and tools cannot be rendered: "),
        ("reset", coroutine(None), "crash: reset is None, not Observation"),
        ("reset", coroutine(Observation(({"content": "x"},))), "crash: messages and tools cannot be rendered: "),
        ("step", coroutine(None), "crash: step is None, not Observation"),
        ("step", lambda message: Observation(done=True), "crash: step is no coroutine; write `async def step`"),
        ("step", lambda message: 1 / 0, "crash: step: ZeroDivisionError"),
        ("step", lambda: None, "crash: step: TypeError"),
        ("step", cancelling, "crash: step: RuntimeError: the call was cancelled from inside"),
        ("step", said(content=np.ones(2)), "crash: step holds what is no JSON"),
        ("step", coroutine(Observation(done=np.ones(2))), "crash: step: ValueError: The truth value of an array"),
        ("step", said(content=ENDLESS), "crash: step: RecursionError"),
        ("score", coroutine(1.0), "verifier: score is of type float, not Reward"),
        ("score", coroutine(Reward(None, GRADE)), "verifier: score: the reward is no number"),
        ("score", coroutine(Reward(np.float32("inf"), GRADE)), "verifier: score: the reward is inf"),
        (
            "score",
            coroutine(Reward(1.7e308, GRADE)),
            "verifier: score: the reward is 1.7e+308, no number up to 1,000,000",
        ),
        ("score", coroutine(Reward(10**400, GRADE)), "verifier: score: the reward is no number: int too large"),
        ("score", coroutine(Reward(torch.ones(2), GRADE)), "verifier: score: the reward is no number"),
        ("score", coroutine(Reward(1.0, "good")), "verifier: the reward's grade is of type str, not Grade"),
        ("score", coroutine(Reward(1.0, Grade("correct", {1}))), "crash: score holds what is no JSON"),
    ],
)
def test_what_the_protocol_does_not_know_is_a_failure_with_its_reason(what, give, reason):
    source = ScriptedSource("</think>4<|user|>", "</think>5<|user|>")
    rollout = rollout_of(Wrong(what, give), source)
    assert rollout.outcome == "env_failure" and rollout.failure.startswith(reason), rollout.failure
    assert rollout_from_json(json.loads(as_in_the_journal(rollout))) == rollout


def as_in_the_journal(rollout):
    return json.dumps(rollout_to_json(rollout), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("what", "give"),
    [
        ("task", lambda: Task("a\ud800", ({"role": "user", "content": "\udfff"},), "\ud801", "\ud802")),
        ("task", lambda: Task("\ud800", ({"role": "user", "content": "x"},), np.int64(4), np.str_("sum"))),
        ("step", said(content="cut \ud83d", weight=np.float32(0.25), count=[np.int64(3)], flag=np.bool_(True))),
        ("score", coroutine(Reward(np.float32(0.5), Grade("correct", "cut \ud83d", "\ud83d")))),
    ],
)
def test_numbers_of_numpy_and_halves_of_characters_are_made_plain(what, give):
    source = ScriptedSource("</think>4<|user|>", "</think>5<|user|>", "</think>6<|user|>")
    rollout = rollout_of(Wrong(what, give, limits=EpisodeLimits(turns=2)), source)
    assert rollout.outcome in ("ok", "truncated") and type(rollout.reward.value) is float
    assert rollout_from_json(json.loads(as_in_the_journal(rollout))) == rollout
    assert ("\ufffd" in as_in_the_journal(rollout).decode()) and rollout.reward.value == (0.5 if what == "score" else 1)


def test_a_failure_may_say_anything():
    def fail(message):
        raise ValueError("\ud800" + "x" * 5000)

    rollout = rollout_of(Wrong("step", fail), ScriptedSource("</think>4<|user|>"))
    assert rollout.failure.startswith("crash: step: ValueError: \ufffdxxx") and len(rollout.failure) < 2100
    assert rollout_from_json(json.loads(as_in_the_journal(rollout))) == rollout


@pytest.mark.parametrize("own", [True, False], ids=["of the environment", "of the run"])
@pytest.mark.parametrize("what", ["task", "score"])
def test_rewards_and_tasks_that_hang_are_given_up(what, own):
    release = threading.Event()

    def hang(value):
        assert release.wait(120), "nobody gave it up"
        return value

    draw = lambda chance: hang(("2 + 2?", "4")) if what == "task" else ("2 + 2?", "4")
    limits = EpisodeLimits(step_seconds=1.0) if own else EpisodeLimits()
    environment = single_questions("hung", draw, lambda task, message: hang(1.0), limits=limits)
    config = RolloutConfig(thinking=True, step_seconds=120.0 if own else 1.0)
    rollout = rollout_of(environment, ScriptedSource("</think>4<|user|>"), config)
    release.set()
    assert rollout.failure == f"timeout: {what} took longer than 1 s"


def test_the_run_limits_episodes_that_have_no_limit():
    source = ScriptedSource("</think>4<|user|>", hang_at=1)
    late = rollout_of(Chat(), source, RolloutConfig(thinking=True, episode_seconds=0.05))
    assert (late.outcome, late.failure) == ("timeout", "the episode took longer than 0.05 s")
    endless = RolloutConfig(episode_seconds=None, step_seconds=None)
    assert rollout_of(Chat(), ScriptedSource("4<|user|>"), endless).outcome == "ok"
    for wrong in ({"episode_seconds": 0.0}, {"step_seconds": -1.0}):
        with pytest.raises(ConfigError, match="_seconds is"):
            RolloutConfig(**wrong)


@pytest.mark.parametrize("cancelled", [True, False])
def test_an_episode_that_does_not_close_keeps_nobody(cancelled):
    class Stuck(ChatEpisode):
        async def close(self):
            self.env.closed += 1
            await asyncio.sleep(3600)

    class Sticky(Chat):
        def episode(self, task):
            return Stuck(self, task)

    environment = Sticky(slow="step" if cancelled else None)
    config = RolloutConfig(thinking=True, step_seconds=1.0)

    async def main():
        task = asyncio.create_task(play(TICKET, environment, ScriptedSource("</think>4<|user|>"), config))
        while cancelled and not environment.opened:
            await asyncio.sleep(0)
        if cancelled:
            task.cancel()
        return await task

    if cancelled:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(main())
    else:
        assert asyncio.run(main()).outcome == "ok"
    assert environment.closed == 1


class Stubborn(ChatEpisode):
    """Its step goes on when it is cancelled."""

    async def step(self, message):
        while not self.env.release:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)
        return await super().step(message)


@pytest.mark.parametrize("by", ["step", "episode", "cancel"])
def test_a_call_that_cannot_be_cancelled_is_left_behind(by, monkeypatch):
    monkeypatch.setattr(episode_task, "GRACE", 0.05)
    environment = Chat(limits=EpisodeLimits(**{f"{by}_seconds".replace("episode_", ""): 0.3} if by != "cancel" else {}))
    environment.release, environment.episode = False, lambda task: Stubborn(environment, task)

    async def main():
        task = asyncio.create_task(play(TICKET, environment, ScriptedSource("4<|user|>"), RolloutConfig()))
        while not environment.opened:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        if by == "cancel":
            task.cancel()
        return (await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 120))[0]

    watchdog = threading.Timer(120, lambda: setattr(environment, "release", True))
    watchdog.start()
    found = asyncio.run(main())  # whose end waits for all tasks that asyncio knows of
    watchdog.cancel()
    assert not environment.release and environment.closed == 1
    if by == "cancel":
        assert isinstance(found, asyncio.CancelledError)
    else:
        assert found.outcome == {"step": "env_failure", "episode": "timeout"}[by]


def test_the_calls_of_an_episode_share_their_task():
    tasks = set()

    class Noting(ChatEpisode):
        async def meet(self, what):
            tasks.add(asyncio.current_task())

        async def close(self):
            tasks.add(asyncio.current_task())

    environment = Chat()
    environment.episode = lambda task: Noting(environment, task)
    assert rollout_of(environment, ScriptedSource("4<|user|>"), RolloutConfig()).outcome == "ok"
    assert len(tasks) == 1


@pytest.mark.parametrize("timed", [True, False])
def test_an_episode_whose_tools_fail_is_closed(timed):
    class Toolless(ChatEpisode):
        @property
        def tools(self):
            raise LookupError("no tools today")

        @tools.setter
        def tools(self, value):
            pass

    environment = Chat()
    environment.episode = lambda task: Toolless(environment, task)
    rollout = rollout_of(environment, ScriptedSource("4<|user|>"), timed=timed)
    assert rollout.failure == "crash: tools: LookupError: no tools today" and environment.closed == 1


def test_an_episode_that_is_made_too_late_is_closed_by_who_made_it():
    release, closed = threading.Event(), threading.Event()

    class Late(ChatEpisode):
        async def close(self):
            closed.set()

    def episode(task):
        release.wait(120)
        return Late(environment, task)

    environment = Chat(limits=EpisodeLimits(step_seconds=0.2))
    environment.episode = episode
    rollout = rollout_of(environment, ScriptedSource("4<|user|>"), RolloutConfig())
    assert rollout.failure == "timeout: task took longer than 0.2 s" and not closed.is_set()
    release.set()
    assert closed.wait(120)
