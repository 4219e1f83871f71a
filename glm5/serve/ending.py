"""Requests that end before they are done: their deadline passes, their client leaves, or the server ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from fastapi import Request

from glm5.serve.errors import TOO_LATE, ApiError
from glm5.serve.generation import Generation

ENDING = "This server ends, and the request's work had not begun; ask again in a moment."


class Endings:
    """What a server waits for and samples, so that all of it can be ended at once. For its event loop only."""

    def __init__(self) -> None:
        self.ending = False
        self.running: set[Generation] = set()
        """Those that sample now."""
        self._waits: set[asyncio.Timeout] = set()

    async def in_time(self, work: Awaitable[Any], until: float | None) -> None:
        """Waits for what comes before a generation starts. Raises `ApiError`: 504 when its deadline passes first, by
        `time.monotonic`; 503 when the server ends."""
        try:
            async with asyncio.timeout(None if until is None else until - time.monotonic()) as wait:
                self._waits.add(wait)
                try:
                    await work
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            raise ApiError(503, ENDING) if self.ending else ApiError(504, TOO_LATE) from None

    def give_up(self) -> None:
        """What samples ends with what is there (`abort`), what waits is refused. To be called again for latecomers."""
        self.ending = True
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(0.0)
        for generation in self.running:
            generation.close()


async def unless_disconnected(request: Request, work: Callable[[], Any]) -> None:
    """Does the work, or drops it when the client goes away."""
    failed: list[BaseException] = []
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            await disconnected(request)
            failed.append(ApiError(499, "The client went away."))
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        try:
            await work()
        except Exception as error:  # a task group would wrap it
            failed.append(error)
        tasks.cancel_scope.cancel()
    if failed:
        raise failed[0]


async def disconnected(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
