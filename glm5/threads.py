"""Blocking calls beside an event loop, each in a thread of its own.

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
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(function: Callable[P, T], /, *values: P.args, **named: P.kwargs) -> asyncio.Future[T]:
    """Begins a blocking call; its result, or what it raises, is awaited. Cancelling gives up the wait: it runs on.

    Raises RuntimeError, before anything is awaited, where the system has no thread left.
    """
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
            value = context.run(function, *values, **named)
        except StopIteration as error:  # no future may hold one
            setter, value = future.set_exception, RuntimeError(f"{error!r}")
        except BaseException as error:
            setter, value = future.set_exception, error
        with suppress(RuntimeError):  # the loop has ended, so nobody waits
            loop.call_soon_threadsafe(tell, setter, value)

    _thread.start_new_thread(run, ())
    return future
