"""Environments around others: slow ones for benchmarks, and ones that try again.

`Delayed` adds the latency of tools and servers that a laptop does not have. `Retried` begins an episode anew when its
reset fails; a step is never sent twice, since nobody knows whether the first one took effect.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from glm5.envs.protocol import (
    Environment,
    EnvironmentFailure,
    Episode,
    EpisodeLimits,
    Message,
    Observation,
    Reward,
    Task,
    Tool,
    UniformGroups,
)
from glm5.errors import ConfigError

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Latency:
    """Seconds between `low` and `high`, equally likely on a logarithmic scale: most are short, some are long."""

    low: float = 0.05
    high: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ConfigError(f"a latency from {self.low} to {self.high} seconds: give 0 < low <= high.")

    def seconds(self, key: str) -> float:
        """The same for the same key."""
        return float(self.low * (self.high / self.low) ** random.Random(f"latency {self.seed} {key}").random())


@dataclass(frozen=True)
class _Around:
    """What stays the other's."""

    environment: Environment

    @property
    def name(self) -> str:
        """The other's: its tasks and rewards are the same."""
        return self.environment.name

    @property
    def limits(self) -> EpisodeLimits:
        """The other's."""
        return self.environment.limits

    @property
    def uniform_groups(self) -> UniformGroups:
        """The other's."""
        return self.environment.uniform_groups

    def task(self, seed: int, index: int) -> Task:
        """The other's."""
        return self.environment.task(seed, index)


class _AroundEpisode:
    def __init__(self, environment: Environment, task: Task) -> None:
        self._task, self._inner = task, environment.episode(task)

    @property
    def tools(self) -> tuple[Tool, ...]:
        return self._inner.tools

    async def reset(self) -> Observation:
        return await self._inner.reset()

    async def step(self, message: Message) -> Observation:
        return await self._inner.step(message)

    async def score(self) -> Reward:
        return await self._inner.score()

    async def close(self) -> None:
        await self._inner.close()


@dataclass(frozen=True)
class Delayed(_Around):
    """Every step takes longer. How long follows from the task and all that was said so far, so a repeated rollout waits
    as long as the first one, and samples of one task wait differently."""

    latency: Latency = Latency()
    sleep: Sleep = asyncio.sleep
    """A simulator gives its own."""

    def episode(self, task: Task) -> Episode:
        """The other's, slowed."""
        return _DelayedEpisode(self, task)


class _DelayedEpisode(_AroundEpisode):
    def __init__(self, delayed: Delayed, task: Task) -> None:
        super().__init__(delayed.environment, task)
        self._delayed, self._said = delayed, hashlib.sha256(task.id.encode())

    async def step(self, message: Message) -> Observation:
        self._said.update(json.dumps(dict(message), sort_keys=True, default=str).encode())
        await self._delayed.sleep(self._delayed.latency.seconds(self._said.hexdigest()))
        return await self._inner.step(message)


@dataclass(frozen=True)
class Retried(_Around):
    """Episodes are begun up to `tries` times, with a doubling wait between."""

    tries: int = 3
    wait: float = 0.5
    sleep: Sleep = asyncio.sleep

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ConfigError(f"{self.tries} tries: give at least one.")

    def episode(self, task: Task) -> Episode:
        """One that outlives failures of its reset."""
        return _RetriedEpisode(self, task)


class _RetriedEpisode(_AroundEpisode):
    def __init__(self, retried: Retried, task: Task) -> None:
        super().__init__(retried.environment, task)
        self._retried = retried

    async def reset(self) -> Observation:
        for trial in range(self._retried.tries - 1):
            try:
                return await self._inner.reset()
            except EnvironmentFailure:
                await self._inner.close()
            await self._retried.sleep(self._retried.wait * 2**trial)
            self._inner = self._retried.environment.episode(self._task)
        return await self._inner.reset()
