"""The fleet's end of a connection to an engine; `worker.py` is the other end and lists the messages."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from glm5.engine import EngineStats
from glm5.errors import FleetError
from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.job import Order
from glm5.rl.fleet.member import Events, Facts
from glm5.rl.fleet.worker import WeightSource

STOP_SECONDS = 5.0
"""For an engine that was asked to stop; then it is killed."""


class ChannelMember:
    """An engine behind a connection. Two threads: one reads, one writes, so that a full pipe holds nobody up.

    kill: ends the engine's process for certain, and returns when it is gone. gone: whether it has ended.
    """

    facts: Facts

    def __init__(
        self,
        connection: Connection,
        events: Events,
        config: FleetConfig,
        *,
        weights: Callable[[], tuple[WeightSource, ...]],
        kill: Callable[[], None],
        gone: Callable[[float], bool],
        process_id: int | None = None,
    ) -> None:
        self._connection, self._events, self._config = connection, events, config
        self._weights, self._kill, self._gone, self.process_id = weights, kill, gone, process_id
        self._outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._ready: Future[Facts] = Future()
        self._updates: dict[int, Future[int]] = {}
        self._tickets = itertools.count(1)
        self._lock = threading.Lock()
        self._stats: EngineStats | None = None
        self._heard = self._progressed = time.monotonic()
        self._closing, self._reason = False, ""
        for work in (self._read, self._write):
            threading.Thread(target=work, name="glm5-member", daemon=True).start()

    def wait(self) -> None:
        """Returns when the engine is ready. Raises `FleetError`, or the engine's own error when it refuses."""
        try:
            self.facts = self._ready.result(self._config.start_seconds)
        except TimeoutError:
            self.close(kill=True)
            raise FleetError(f"the engine was not ready within {self._config.start_seconds:g} s") from None
        except BaseException:
            self.close(kill=True)
            raise

    # ---- Member -------------------------------------------------------------------------------------------------
    def begin(self, order: Order) -> None:
        """Starts a request."""
        self._outbox.put(("begin", order))

    def abort(self, number: int) -> None:
        """Ends a request."""
        self._outbox.put(("abort", number))

    def update(self, version: int) -> Future[int]:
        """Takes the newest weights."""
        future: Future[int] = Future()
        ticket = next(self._tickets)
        with self._lock:
            if self._closing:
                future.set_exception(FleetError("the engine is gone"))
            self._updates[ticket] = future
        self._outbox.put(("weights", ticket, self._weights()))
        return future

    def trouble(self, stood_still: float) -> str | None:
        """Its end, silence, or no step while there is work."""
        now, stats = time.monotonic(), self._stats
        self._heard = min(self._heard + stood_still, now)
        self._progressed = min(self._progressed + stood_still, now)
        if self._closing:
            return self._reason  # its end came before it had a seat, or is just being told
        if now - self._heard > self._config.silence_seconds:
            return f"no sign of life for {now - self._heard:.0f} s"
        if stats is not None and stats.running + stats.waiting and now - self._progressed > self._config.stuck_seconds:
            return f"no step for {now - self._progressed:.0f} s with {stats.running} sequences running"
        return None

    def stats(self) -> EngineStats | None:
        """As it last said."""
        return self._stats

    def close(self, *, kill: bool) -> None:
        """Ends it."""
        self._give_up("it was closed")
        if not kill:
            self._outbox.put(("stop",))
            if not self._gone(STOP_SECONDS):
                kill = True
        if kill:
            self._kill()
        self._outbox.put(None)
        with suppress(OSError):
            self._connection.close()

    # ---- the threads --------------------------------------------------------------------------------------------
    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except (OSError, ValueError):
                return  # the reader says so

    def _read(self) -> None:
        try:
            while True:
                self._hear(*self._connection.recv())
        except Exception as error:  # whatever a dying process leaves in its pipe
            ended = (
                "its process has ended" if isinstance(error, EOFError | OSError) else f"it sent nonsense ({error!r})"
            )
            self._end(ended)

    def _hear(self, kind: str, *values: Any) -> None:
        self._heard = time.monotonic()
        if kind == "tokens":
            self._events.delivered(self, *values)
        elif kind == "end":
            self._events.ended(self, *values)
        elif kind == "alive":
            (stats,) = values
            if self._stats is None or stats.steps != self._stats.steps or not stats.running + stats.waiting:
                self._progressed = self._heard
            self._stats = stats
        elif kind == "taken":
            ticket, version, error = values
            with self._lock:
                future = self._updates.pop(ticket, None)
            if future is not None and not future.done():
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(version)
        elif kind == "ready":
            self._ready.set_result(*values)
        elif kind == "refused":
            self._ready.set_exception(*values)
        elif kind == "failed":
            self._end(*values)

    def _end(self, reason: str) -> None:
        """It is to be replaced, unless it is being closed."""
        if not self._give_up(reason):
            self._events.lost(self, reason)

    def _give_up(self, reason: str) -> bool:
        """Nobody waits for it any longer; True if that was so before."""
        with self._lock:
            before, self._reason = self._closing, self._reason or reason
            self._closing = True
            waiting: list[Future[Any]] = [*self._updates.values(), self._ready]
        for future in waiting:
            with suppress(Exception):  # it may be done
                future.set_exception(FleetError(f"{reason} before it answered"))
        return before
