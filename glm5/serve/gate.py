"""Who runs now and who waits."""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from glm5.serve.errors import ApiError

Disconnected = Callable[[], Awaitable[Any]]
"""Gives something that ends when the client goes away."""


async def done_while_there(work: asyncio.Future[Any], disconnected: Disconnected, seconds: float | None = None) -> bool:
    """Waits for the work, or so long at most: whether it is done. Raises `ApiError` (499) when the client leaves first.

    The work itself is neither cancelled nor asked for its result.
    """
    gone = asyncio.ensure_future(disconnected())
    try:
        done, _ = await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if gone in done and work not in done:
        raise ApiError(499, "The client went away.")
    return work in done


class Gate:
    """Places for running requests; a queue of bounded length stands before them, the lowest rank first."""

    def __init__(self, places: int, max_waiting: int) -> None:
        self.places, self.max_waiting = places, max_waiting
        self.running = self.aside = 0
        self._queue: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Requests in the queue, and those that stepped aside."""
        return len(self._queue) + self.aside

    async def enter(self, disconnected: Disconnected, rank: float) -> None:
        """Takes a place, after a wait if need be. Raises `ApiError` (499) when the client left the queue."""
        if self.running < self.places:
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (rank, next(self._numbers), turn)
        bisect.insort(self._queue, entry)
        try:
            await done_while_there(turn, disconnected)
        except BaseException:
            if turn.done():
                self.leave()
            raise
        finally:
            if not turn.done():
                self._queue.remove(entry)

    def leave(self) -> None:
        """Gives the place back, to the first of the queue if there is one."""
        if self._queue:
            self._queue.pop(0)[-1].set_result(None)
        else:
            self.running -= 1


class Place:
    """The place of one request, which it holds or does not.

    `rank`, in seconds, is its time of arrival moved by its priority, as in the engine's scheduler.
    """

    def __init__(self, gate: Gate, disconnected: Disconnected, rank: float = 0.0) -> None:
        self.gate, self.disconnected, self.rank = gate, disconnected, rank
        self.held = False

    async def take(self) -> None:
        """Waits for it. Raises `ApiError`: 429 when the queue is full, 499 when the client left it."""
        gate = self.gate
        if gate.running >= gate.places and gate.waiting >= gate.max_waiting:
            raise ApiError(
                429, f"The server runs {gate.running} requests and {gate.waiting} wait; try again in a moment."
            )
        await gate.enter(self.disconnected, self.rank)
        self.held = True

    def leave(self) -> None:
        """Gives it back, if it is held."""
        if self.held:
            self.held = False
            self.gate.leave()

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """For work that needs no place: others run meanwhile. After it the request waits for a place in its old rank.

        If the work fails, or the client has left, no place is held.
        """
        self.leave()
        self.gate.aside += 1
        try:
            yield
        finally:
            self.gate.aside -= 1
        await self.gate.enter(self.disconnected, self.rank)
        self.held = True
