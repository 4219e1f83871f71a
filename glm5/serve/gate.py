"""Who runs now and who waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from glm5.serve.errors import ApiError


class Gate:
    """Places for running requests, given in the order of asking; a queue of bounded length stands before them."""

    def __init__(self, places: int, max_waiting: int) -> None:
        self.places, self.max_waiting = places, max_waiting
        self.running = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def enter(self, disconnected: Callable[[], Awaitable[Any]]) -> None:
        """Takes a place, after a wait if need be. `disconnected` ends when the client goes away.

        Raises `ApiError`: 429 when the queue is full, 499 when the client left it.
        """
        if self.running < self.places:
            self.running += 1
            return
        if len(self._queue) >= self.max_waiting:
            raise ApiError(
                429, f"The server runs {self.running} requests and {self.waiting} wait; try again in a moment."
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        gone = asyncio.ensure_future(disconnected())
        try:
            await asyncio.wait({turn, gone}, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            if turn.done():
                self.leave()
            raise
        finally:
            gone.cancel()
            if not turn.done():
                self._queue.remove(turn)
        if not turn.done():
            raise ApiError(499, "The client went away.")

    def leave(self) -> None:
        """Gives the place back, to the first of the queue if there is one."""
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self.running -= 1
