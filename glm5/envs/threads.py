"""Blocking code of environments (tools, games, rewards) in threads that nobody waits for."""

from __future__ import annotations

import _thread
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from glm5.envs.protocol import EnvironmentFailure
from glm5.threads import in_thread

P = ParamSpec("P")
T = TypeVar("T")
MOST = 4096
"""Threads of this process. A call that hangs keeps its thread for ever; past these no more are begun."""


async def in_own_thread(function: Callable[P, T], /, *values: P.args, **named: P.kwargs) -> T:
    """`in_thread`; raises `EnvironmentFailure` when calls that hang have used the threads up."""
    try:
        if _thread._count() >= MOST:
            raise RuntimeError(f"{MOST} threads run already")
        awaited = in_thread(function, *values, **named)
    except RuntimeError as error:
        raise EnvironmentFailure(f"no thread is left ({error}): too many calls of environments hang") from error
    return await awaited
