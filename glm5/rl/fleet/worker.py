"""The engine's end of a connection to a fleet: runs in the engine's own process, wherever that is.

Messages are pickled tuples, the first element of which names them:

    fleet to engine   begin Order | abort number | weights ticket sources | stop
    engine to fleet   ready Facts | refused error | tokens [Delivery] | end number error | taken ticket version error
                      | alive EngineStats | failed reason

When the connection breaks, the fleet is gone, and so is the process: nobody is left behind. When the engine has failed,
or a step of it (no memory is left, say), its requests do not end: the fleet hears of it, and has them go on elsewhere.
What fails for one request alone ends that one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

from glm5.engine import Engine, TokenStream
from glm5.errors import FleetError, GLM5Error
from glm5.rl.fleet.job import Delivery, Order
from glm5.rl.fleet.member import Facts
from glm5.rl.weights import Snapshot
from glm5.threads import OneThread, in_thread

ALIVE_SECONDS = 0.25
Build = Callable[[], Engine]
"""Makes the engine, in its own process: `functools.partial(glm5.Engine, directory, strict=True)`."""


class Subscriber(Protocol):
    """Where weights come from, as `glm5.rl.weights` has them."""

    def newest(self) -> Snapshot | None:
        """What is newer than the last, or None."""


class WeightSource(Protocol):
    """Opens a subscriber; can be pickled, and equal ones open the same."""

    def open(self) -> Subscriber:
        """The subscriber."""


class Worker:
    """One engine that serves one connection. `run` returns when the fleet says stop, or the engine has failed.

    lost: called when the connection breaks; it must end the process.
    """

    def __init__(
        self,
        connection: Connection,
        build: Build,
        *,
        recompute: bool | None = None,
        lost: Callable[[], None] = partial(os._exit, 1),
    ) -> None:
        self._connection, self._build, self._recompute, self._lost = connection, build, recompute, lost
        self._inbox: list[tuple[Any, ...]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._subscribers: dict[WeightSource, Subscriber] = {}
        self._lock = threading.Lock()
        self._outbox: list[Delivery] = []
        self._failure = ""
        """Why the engine is to be replaced."""

    def run(self) -> None:
        """Builds the engine and serves. A refusal by the engine is passed on, and ends the run."""
        threading.Thread(target=self._receive, name="glm5-worker", daemon=True).start()
        try:
            self.engine = self._build()
        except Exception as error:
            self._send("refused", _portable(error))
            return
        try:
            asyncio.run(self._serve())
        finally:
            self.engine.close()

    def update(self, snapshot: Snapshot) -> int:
        """Gives the engine newer weights (in any thread); its version then."""
        if snapshot.version > self.engine.version:
            self.engine.update_weights(snapshot.version, snapshot.tensors, recompute=self._recompute)
        return self.engine.version

    # ---- the connection -----------------------------------------------------------------------------------------
    def _send(self, *message: Any) -> None:
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            self._lost()

    def _receive(self) -> None:
        """Reads from the first moment on (in a thread of its own), to notice the fleet's end while weights load."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                self._lost()
                return
            with self._lock:
                self._inbox.append(message)
                loop = self._loop
            if loop is not None:
                try:
                    loop.call_soon_threadsafe(self._read)
                except RuntimeError:  # it has stopped
                    return

    # ---- in the loop --------------------------------------------------------------------------------------------
    async def _serve(self) -> None:
        engine, self._stopped, self._in_weights_thread = self.engine, asyncio.Event(), OneThread()
        shapes = {name: tuple(tensor.shape) for name, tensor in engine.model.state_dict().items()}
        self._send("ready", Facts(engine.version, engine.limits, shapes))
        with self._lock:
            self._loop = asyncio.get_running_loop()
        self._read()
        while not self._stopped.is_set():
            if engine.failure is not None:
                self._failed(f"its engine has ended by a mistake of its own ({engine.failure})")
                break
            self._send("alive", engine.stats())
            try:
                await asyncio.wait_for(self._stopped.wait(), ALIVE_SECONDS)
            except TimeoutError:
                pass
        self._in_weights_thread.close()
        if self._failure:
            self._flush()
            self._send("failed", self._failure)

    def _failed(self, reason: str) -> None:
        """The fleet is to hear of it, and of no request's end."""
        self._failure = self._failure or reason
        self._stopped.set()

    def _read(self) -> None:
        with self._lock:
            messages, self._inbox = self._inbox, []
        for kind, *values in messages:
            if kind == "begin":
                self._tasks[values[0].number] = asyncio.create_task(self._stream(*values))
            elif kind == "abort" and values[0] in self._tasks:
                self._tasks.pop(values[0]).cancel()
            elif kind == "weights":
                self._tasks[-values[0]] = asyncio.create_task(self._take(*values))
            elif kind == "stop":
                self._stopped.set()

    async def _stream(self, order: Order) -> None:
        """One request, from its admission to its end."""
        error: BaseException | None = None
        stream = None
        try:
            stream = await in_thread(
                self.engine.stream, order.prompt_ids, order.params, session_id=order.session_id,
                priority=order.priority, deadline=order.deadline, said=order.said,
            )  # fmt: skip
            await self._tell(order.number, stream)
        except asyncio.CancelledError:
            raise
        except BaseException as failure:
            error = failure
        finally:
            if stream is not None:
                stream.close()
        self._tasks.pop(order.number, None)
        if error is not None and self.engine.failure is not None:
            self._failed(f"its engine has ended by a mistake of its own ({self.engine.failure})")
        elif stream is not None and error is not None and stream.step_failed:
            self._failed(f"a step of its engine failed ({error!r})")
        else:
            self._flush()
            self._send("end", order.number, error and _portable(error))

    async def _tell(self, number: int, stream: TokenStream) -> None:
        """The tokens of a request, together with those that others get at the same time."""
        first = True
        async for delta in stream:
            if not self._outbox:
                asyncio.get_running_loop().call_soon(self._flush)
            scores = stream.prompt_logprobs if first else None
            self._outbox.append(Delivery(number, [delta], stream.cached_tokens, scores))
            first = False

    def _flush(self) -> None:
        """Sends what all requests have got since the last time, together."""
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._send("tokens", outbox)

    async def _take(self, ticket: int, sources: tuple[WeightSource, ...]) -> None:
        """Takes the newest weights while the requests go on."""
        try:
            version = await self._in_weights_thread(self._newest, sources)
            self._send("taken", ticket, version, None)
        except Exception as error:
            self._send("taken", ticket, self.engine.version, _portable(error))
        self._tasks.pop(-ticket, None)

    def _newest(self, sources: tuple[WeightSource, ...]) -> int:
        """Takes what is new of whole weights and of adapters, the older first."""
        for source in sources:
            if source not in self._subscribers:
                self._subscribers[source] = source.open()
            snapshot = self._subscribers[source].newest()
            if snapshot is not None:
                self.update(snapshot)
        return self.engine.version


def _portable(error: BaseException) -> GLM5Error:
    """An error that can be sent: the user's own as they are, others in words."""
    return error if isinstance(error, GLM5Error) else FleetError(f"The engine failed: {error!r}; look at its log.")
