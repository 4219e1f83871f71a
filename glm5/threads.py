"""Blocking calls beside an event loop, each in a thread of its own, or all of one kind in one.

asyncio's own threads are few (`asyncio.to_thread`: cores + 4), everybody shares them, and the end of the loop waits for
all of them. So a few calls that hang keep every other one from running, and a single one keeps the program from ending.
Here a call that never returns costs its thread and nothing else; nobody ever joins it.

`threading.Thread.start` would wait until the new thread runs, which takes milliseconds beside one that computes in
Python: time in which the loop stands still.
"""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import queue
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(function: Callable[P, T], /, *values: P.args, **named: P.kwargs) -> asyncio.Future[T]:
    """Begins a blocking call; its result, or what it raises, is awaited. Cancelling gives up the wait: it runs on.

    Raises RuntimeError, before anything is awaited, where the system has no thread left.
    """
    future, run = _prepared(partial(function, *values, **named))
    _thread.start_new_thread(run, ())
    return future


class OneThread:
    """Runs blocking calls one after the other in a single thread, which `close` ends and nobody joins.

    For calls that take much memory: the C library gives threads pools of their own and keeps in each what was freed
    there, so that calls in ever new threads come to hold a multiple of what one of them needs.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._begun = False

    def __call__(self, function: Callable[P, T], /, *values: P.args, **named: P.kwargs) -> asyncio.Future[T]:
        """As `in_thread`, after the calls before it."""
        future, run = _prepared(partial(function, *values, **named))
        if not self._begun:
            _thread.start_new_thread(self._work, ())
            self._begun = True
        self._calls.put(run)
        return future

    def close(self) -> None:
        """The thread ends behind its last call."""
        self._calls.put(None)

    def _work(self) -> None:
        while (run := self._calls.get()) is not None:
            run()
            del run  # and with it what the call was given, while the next one is waited for


def _prepared(call: Callable[[], T]) -> tuple[asyncio.Future[T], Callable[[], None]]:
    """What a call is awaited by, and what a thread is to run."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def tell(setter: Callable[[Any], None], value: object) -> None:
        if not future.done():
            setter(value)

    def run() -> None:
        setter: Callable[[Any], None] = future.set_result
        value: object
        try:
            value = context.run(call)
        except StopIteration as error:  # no future may hold one
            setter, value = future.set_exception, RuntimeError(f"{error!r}")
        except BaseException as error:
            setter, value = future.set_exception, error
        with suppress(RuntimeError):  # the loop has ended, so nobody waits
            loop.call_soon_threadsafe(tell, setter, value)

    return future, run
