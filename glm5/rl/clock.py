"""Time that is counted, not measured: what is due next, in an order that does not depend on the machine."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import Generic, TypeVar

T = TypeVar("T")


class VirtualClock(Generic[T]):
    """Holds what will happen. Of two things due at the same time the one that was planned first comes first."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the start."""
        self._due: list[tuple[float, int, T]] = []
        self._numbers = itertools.count()

    @property
    def due(self) -> float:
        """When the next thing happens; infinite when nothing is planned."""
        return self._due[0][0] if self._due else math.inf

    def after(self, seconds: float, what: T) -> None:
        """Plans something so many seconds from now."""
        if not seconds >= 0:
            raise ValueError(f"nothing can be planned {seconds} seconds from now")
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), what))

    def next(self) -> T | None:
        """Moves on to what is due next; None when nothing is."""
        if not self._due:
            return None
        self.now, _, what = heapq.heappop(self._due)
        return what
