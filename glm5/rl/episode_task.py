"""Runs the calls of one episode in a task of their own, so that one which never lets go can be left behind.

Cancelling a coroutine only asks it to end: one that catches `CancelledError` goes on, and whoever awaits it waits as
long. Here the wait is what ends. All calls of an episode share the task, since what the first one opened (the cancel
scope of a connection, a context variable) may be of use to that task alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

T = TypeVar("T")
GRACE = 5.0
"""Seconds in which a call that was cancelled may tidy up."""
END_SECONDS = 60.0
"""In which rollouts that are called off at the end of a run close their episodes; then they are left behind."""


class TookTooLong(Exception):
    """A call met its limit."""


class EpisodeTask:
    """Calls one after the other; `end` when there are no more."""

    def __init__(self) -> None:
        self._calls: asyncio.Queue[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any]] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._running: asyncio.Future[Any] | None = None
        """The result of the call that runs."""
        self.lost = False
        """Whether a call was left behind; the task takes no more."""

    async def __call__(self, call: Callable[[], Awaitable[T]], seconds: float | None) -> T:
        """Its result. Raises `TookTooLong`; past the limit, or when cancelled, it returns within `GRACE`."""
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        told: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put_nowait((call, told))
        try:
            done, _ = await asyncio.wait([told], timeout=seconds)
        except asyncio.CancelledError:
            await self._give_up(told)
            raise
        if not done:
            await self._give_up(told)
            raise TookTooLong
        if told.cancelled():
            raise RuntimeError("the call was cancelled from inside")
        return told.result()

    def end(self) -> None:
        """The task ends behind its last call."""
        self._calls.put_nowait(None)

    async def _give_up(self, told: asyncio.Future[Any]) -> None:
        assert self._task is not None
        if self._running is told:
            self._task.cancel()
            try:
                await asyncio.wait([told], timeout=GRACE)
            finally:
                if not told.done():
                    self.lost = True
                    leave(self._task)
        told.cancel()
        if not told.cancelled():
            told.exception()  # nobody wants to know

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while not self.lost and (item := await self._calls.get()) is not None:
            call, told = item
            if told.cancelled():
                continue
            self._running = told
            try:
                result = await call()
                if not told.done():
                    told.set_result(result)
            except GeneratorExit:
                raise
            except asyncio.CancelledError:
                told.cancel()
            except BaseException as error:
                if not told.done():
                    told.set_exception(error)
            self._running = None
            while task.cancelling():  # a later call may use timeouts, which count
                task.uncancel()


def leave(task: asyncio.Task[Any]) -> None:
    """The end of the event loop does not wait for the task either."""
    asyncio._unregister_task(task)


async def ended(rollouts: Collection[asyncio.Task[None]]) -> None:
    """Waits for the tasks, but not for ever."""
    if rollouts:
        _, hung = await asyncio.wait(rollouts, timeout=END_SECONDS)
        for task in hung:
            leave(task)
