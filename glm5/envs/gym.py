"""Gymnasium-style objects as environments: anything with `reset(seed=...)`, `step(action)` and, maybe, `close()`.

    environment = GymEnvironment("frozen-lake", lambda: gymnasium.make("FrozenLake-v1", is_slippery=False),
                                 instructions="Reach G. Answer with one of: left, down, right, up.",
                                 action=lambda text: ["left", "down", "right", "up"].index(text.split()[-1].lower()))

`reset` gives (observation, info), `step` gives (observation, reward, terminated, truncated, info), as Gymnasium, gem
and TextArena do; gymnasium itself need not be installed. Observations become user messages, the model's content becomes
the action. The reward of an episode is the sum of its steps. Calls run in threads, one at a time for each episode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from glm5.envs.protocol import (
    EnvironmentFailure,
    EpisodeLimits,
    Message,
    Observation,
    Reward,
    Task,
    Tool,
    UniformGroups,
)
from glm5.envs.rewards import reward_of
from glm5.envs.threads import in_own_thread


class GymLike(Protocol):
    """What is needed of the object."""

    def reset(self, *, seed: int) -> tuple[Any, Any]:
        """Begins anew; the seed fixes everything."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, Any]:
        """observation, reward, terminated, truncated, info."""


def stripped(text: str) -> str:
    """The action of a text environment: what was said."""
    return text.strip()


@dataclass(frozen=True)
class GymEnvironment:
    """`make` gives a new object for each episode; the seed of its reset follows from the task."""

    name: str
    make: Callable[[], GymLike]
    instructions: str = ""
    """Above the first observation."""
    action: Callable[[str], Any] = stripped
    """From the model's content. A ValueError, LookupError or TypeError is told to the model, and costs it a turn."""
    shown: Callable[[Any], str] = str
    """An observation as text."""
    limits: EpisodeLimits = field(default_factory=lambda: EpisodeLimits(turns=32))
    uniform_groups: UniformGroups = "drop"

    def task(self, seed: int, index: int) -> Task:
        """The task is the seed of the reset; its messages come with the episode."""
        messages = ({"role": "user", "content": self.instructions},) if self.instructions else ()
        return Task(f"{self.name}/{seed}/{index}", messages, answer="", category="all")

    def episode(self, task: Task) -> GymEpisode:
        """A new object, made at the reset."""
        return GymEpisode(self, task)


class GymEpisode:
    """One pass from reset to the end that the object announces."""

    tools: tuple[Tool, ...] = ()

    def __init__(self, environment: GymEnvironment, task: Task) -> None:
        self._environment, self._task = environment, task
        self._game: Any = None
        self._total = 0.0

    async def reset(self) -> Observation:
        """The instructions and the first observation in one message."""
        seed = int.from_bytes(hashlib.sha256(self._task.id.encode()).digest()[:4], "little") >> 1
        self._game = await self._do("make", self._environment.make)
        observation, _ = await self._do("reset", lambda: self._game.reset(seed=seed))
        text = "\n\n".join(filter(None, (self._environment.instructions, self._environment.shown(observation))))
        return Observation(({"role": "user", "content": text},))

    async def step(self, message: Message) -> Observation:
        """One action."""
        try:
            action = self._environment.action(message.get("content") or "")
        except (ValueError, LookupError, TypeError) as error:
            return Observation(({"role": "user", "content": f"That is no valid action: {error}"},))
        observation, reward, terminated, truncated, _ = await self._do("step", lambda: self._game.step(action))
        self._total += float(reward)
        if terminated or truncated:
            return Observation(done=True)
        return Observation(({"role": "user", "content": self._environment.shown(observation)},))

    async def score(self) -> Reward:
        """The sum of the rewards so far."""
        return reward_of(self._total, self._task)

    async def close(self) -> None:
        """Closes the object where it can be closed."""
        close = getattr(self._game, "close", None)
        self._game = None
        if close is not None:
            try:
                await in_own_thread(close)
            except Exception:
                pass  # the episode is over; there is nobody to tell

    async def _do(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return await in_own_thread(call)
        except EnvironmentFailure:
            raise
        except Exception as error:
            raise EnvironmentFailure(f"{what} of {self._task.id} raised {error!r}", "crash") from error
