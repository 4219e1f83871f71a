"""Engines in virtual time: all of them as one, because a rollout may go to any."""

from __future__ import annotations

import heapq
from collections import deque

from glm5.rl.simulation.workload import EngineSpeed


class VirtualEngines:
    """Each sequence has the same speed, so one counter of tokens says who is done."""

    def __init__(self, speed: EngineSpeed) -> None:
        self.speed = speed
        self.made = 0.0
        """Tokens that a sequence would have, had it been there from the start."""
        self.active: dict[str, float] = {}
        """Rollout ids, with the count at which each is done."""
        self.waiting: deque[tuple[str, int]] = deque()
        self._order: list[tuple[float, str]] = []

    def add(self, name: str, tokens: int) -> bool:
        """A sequence of so many tokens. False: it waits for a place."""
        if len(self.active) >= self.speed.places * self.speed.engines:
            self.waiting.append((name, tokens))
            return False
        self.active[name] = self.made + tokens
        heapq.heappush(self._order, (self.active[name], name))
        return True

    def remove(self, name: str) -> list[str]:
        """It is done, or called off. Gives those that take its place."""
        if self.active.pop(name, None) is None:
            self.waiting = deque(pair for pair in self.waiting if pair[0] != name)
            return []
        return [pair[0] for pair in [self.waiting.popleft()] if self.add(*pair)] if self.waiting else []

    @property
    def total(self) -> float:
        """Tokens per second of all."""
        n = len(self.active) / self.speed.engines
        return self.speed.tokens_per_second(n) * self.speed.engines

    @property
    def beyond(self) -> bool:
        """Whether so many sequences run that the speed is a guess."""
        return len(self.active) > 1.5 * self.speed.points[-1][0] * self.speed.engines

    def first(self) -> tuple[float, str] | None:
        """Tokens until the next is done, and which."""
        while self._order and self.active.get(self._order[0][1]) != self._order[0][0]:
            heapq.heappop(self._order)
        return (self._order[0][0] - self.made, self._order[0][1]) if self._order else None
