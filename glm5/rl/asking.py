"""Asks an environment's code, which may be anybody's: slow, hung, broken, or other than the protocol says.

Whatever it does wrong becomes an `EnvironmentFailure` with the reason. What it gives is made plain before it goes on:
messages that the tokenizer and the journal can take, a reward that is a number.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, TypeVar

from glm5.envs import Environment, EnvironmentFailure, Episode, FailureKind, Message, Observation, Reward, Task, Tool
from glm5.envs.protocol import LARGEST_REWARD
from glm5.envs.threads import in_own_thread
from glm5.rl.episode_task import EpisodeTask, TookTooLong
from glm5.scoring import Grade

T = TypeVar("T")
SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of UTF-16 characters, which are no text: they come of cut strings and of bytes that were read as text."""
CLOSE_SECONDS = 30.0
"""For `close`, unless a step has less."""
LONGEST_REASON = 2000
"""Characters of a failure."""
IN_A_SENTENCE = 300
"""Characters of one that is quoted; the rollout in the journal has all of it."""


class Asking:
    """The environment's side of one episode."""

    def __init__(self, environment: Environment, step_seconds: float | None, *, timed: bool) -> None:
        """step_seconds: of each call; None: no limit. timed: whether it counts; if not, no threads are used either."""
        self.environment, self.step_seconds, self.timed = environment, step_seconds, timed
        self.seconds = 0.0
        """Spent in its calls so far."""
        self._task = EpisodeTask()
        self._lock = threading.Lock()
        """Of the two below, which a thread sets that nobody may wait for any more."""
        self._episode: Episode | None = None
        self._over = False

    async def begin(self, seed: int, index: int) -> tuple[Task, Episode, list[Tool]]:
        """The task as the journal holds it, its episode, and the tools."""

        async def begun() -> tuple[Task, Episode, list[Tool]]:
            return await in_own_thread(self._begun, seed, index) if self.timed else self._begun(seed, index)

        return await self._answer("task", begun)

    async def reset(self, episode: Episode) -> Observation:
        """The first messages."""
        return plain_observation("reset", await self._answer("reset", episode.reset))

    async def step(self, episode: Episode, message: Message) -> Observation:
        """What it answers."""
        return plain_observation("step", await self._answer("step", episode.step, message))

    async def score(self, episode: Episode) -> Reward:
        """A finite number with its reason."""
        return plain_reward(await self._answer("score", episode.score))

    async def close(self) -> None:
        """Closes the episode, now or once it is made. Whatever that raises, nobody is left to tell. Always limited:
        nothing hangs on it but the rollout's place."""
        with self._lock:
            self._over, episode = True, self._episode
        task = EpisodeTask() if self._task.lost else self._task
        try:
            if episode is not None:
                await self._closed(episode, task if self.timed else None)
        finally:
            task.end()

    async def _closed(self, episode: Episode, task: EpisodeTask | None) -> None:
        seconds = min(CLOSE_SECONDS, self.step_seconds or CLOSE_SECONDS)
        with suppress(Exception, SystemExit):
            if task is not None:
                await task(episode.close, seconds)
            else:
                async with asyncio.timeout(seconds):
                    await episode.close()

    def _begun(self, seed: int, index: int) -> tuple[Task, Episode, list[Tool]]:
        task = _blaming("task", self.environment.task, seed, index)
        known = plain_task(task)
        episode = _blaming("episode", self.environment.episode, task)
        with self._lock:
            self._episode, late = episode, self._over
        if late:  # this is a thread that nobody waits for
            asyncio.run(self._closed(episode, None))
        return known, episode, _blaming("tools", lambda: [plain(tool) for tool in episode.tools])

    async def _answer(self, what: str, function: Callable[..., Awaitable[T]], *values: object) -> T:
        """The result of an async method, within the limit."""
        begun = time.perf_counter()

        async def called() -> T:
            call = function(*values)
            if not inspect.isawaitable(call):
                raise EnvironmentFailure(f"{what} is no coroutine; write `async def {what}`")
            return await call

        try:
            if self.timed:
                return await self._task(called, self.step_seconds)
            return await called()
        except EnvironmentFailure:
            raise
        except TookTooLong:
            raise EnvironmentFailure(f"{what} took longer than {self.step_seconds:g} s", "timeout") from None
        except (Exception, SystemExit) as error:
            raise EnvironmentFailure(f"{what}: {type(error).__name__}: {error}") from error
        finally:
            self.seconds += time.perf_counter() - begun


def plain(value: Any) -> Any:
    """Mappings as dictionaries, sequences as lists, NumPy's scalars as Python's, text without halves of characters."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.item() if hasattr(value, "dtype") and getattr(value, "shape", None) == () else value


def plain_task(given: Any) -> Task:
    """Of the plain class itself, for the journal."""
    task = _of("task", given, Task)
    found = _blaming("task", plain, [task.id, task.answer, task.category])
    _storable("task", found)
    return Task(found[0], _messages("task", task.messages), found[1], found[2])


def plain_observation(what: str, given: Any) -> Observation:
    """Its messages as the journal holds them."""
    observation = _of(what, given, Observation)
    return Observation(_messages(what, observation.messages), _blaming(what, bool, observation.done))


def plain_reward(given: Any) -> Reward:
    """Its value as a float that can be compared with others."""
    reward = _of("score", given, Reward, "verifier")
    grade = _of("the reward's grade", reward.grade, Grade, "verifier")
    try:
        value = float(reward.value)
    except (Exception, SystemExit) as error:  # too large, an array, or whatever its own `__float__` raises
        raise EnvironmentFailure(f"score: the reward is no number: {error}", "verifier") from error
    if not abs(value) <= LARGEST_REWARD:
        raise EnvironmentFailure(f"score: the reward is {value}, no number up to {LARGEST_REWARD:,.0f}", "verifier")
    found = _blaming("score", plain, [grade.outcome, grade.reason, grade.extracted])
    _storable("score", found)
    return Reward(value, Grade(found[0], found[1], found[2], judged=_blaming("score", bool, grade.judged)))


def reason_of(kind: FailureKind | Literal["engine"], error: Exception) -> str:
    """The failure as a rollout tells it."""
    text: str = plain(f"{kind}: {error}")
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."


def quoted(failure: str) -> str:
    """A failure as a part of a sentence: one line, not too long, without a full stop."""
    line = " ".join(failure.split()).rstrip(".")
    return line if len(line) <= IN_A_SENTENCE else line[:IN_A_SENTENCE].rstrip() + "…"


def _messages(what: str, given: Any) -> tuple[Message, ...]:
    found = _blaming(what, lambda: [plain(message) for message in given])
    for message in found:
        _of(f"a message of {what}", message, dict)
    _storable(what, found)
    return tuple(found)


def _of(what: str, given: Any, kind: type[T], blame: FailureKind = "crash") -> T:
    if not isinstance(given, kind):
        found = "None" if given is None else f"of type {type(given).__name__}"
        raise EnvironmentFailure(f"{what} is {found}, not {kind.__name__}", blame)
    return given


def _storable(what: str, value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise EnvironmentFailure(f"{what} holds what is no JSON: {error}") from error


def _blaming(what: str, function: Callable[..., T], *values: object) -> T:
    """The result of the environment's code; an exception of it is a failure of the environment."""
    try:
        return function(*values)
    except EnvironmentFailure:
        raise
    except (Exception, SystemExit) as error:
        raise EnvironmentFailure(f"{what}: {type(error).__name__}: {error}") from error
