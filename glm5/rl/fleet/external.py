"""Other servers as the engines of a fleet: glm5, vLLM and SGLang endpoints that take and give token ids.

Tokens go through `glm5.serve.backend.Backend`. A server that is away, or says by its `/health` that it cannot answer,
is a seat that is empty until it is well again; its requests go on at another one, with their tokens so far as prompt.
So one that was started anew gets the newest weights before it is asked for a token. How they get there is a
`WeightDelivery` (`delivery.py`); without one the servers keep their weights, as teachers and judges do.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import httpx
from torch import Tensor

from glm5.engine import EngineStats, SamplingParams, TokenDelta
from glm5.engine.admission import Limits
from glm5.errors import FleetError, GLM5Error, RequestFailed
from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.delivery import ASK_SECONDS, WeightDelivery
from glm5.rl.fleet.job import FEW, Delivery, Order
from glm5.rl.fleet.member import Events, Facts
from glm5.rl.outage import pauses
from glm5.serve.backend import Backend, BackendAway, BackendStream
from glm5.serve.errors import ApiError
from glm5.threads import OneThread

UNWELL_SECONDS = 3.0
"""For which a server refuses connections, or says by its `/health` that it cannot answer, before it counts as dead:
longer than a hiccup, shorter than one takes to be started anew, which must not go unnoticed."""
BUSY_SECONDS = 1.0
"""Before a server that answered 429 is asked again."""
START_SECONDS = 10.0
"""For which a server is asked whether it is there before that counts as a failure."""
REFUSED_SECONDS = 10.0
"""For which a request that a server fails at, while it takes others, is tried there again."""


@dataclass(eq=False)
class Asked:
    """A request of the server, and how far it has come."""

    order: Order
    """As the fleet gave it."""
    until: float | None
    """When it must have ended, by `time.monotonic`."""
    said: list[TokenDelta]
    """All tokens that it has."""
    task: asyncio.Task[None] | None = None
    """None while it waits for weights."""
    pauses: Iterator[float] | None = None
    """Before further tries, since it was refused first after it had got on."""
    refused_with: int = 0
    """Tokens that it had then."""

    @classmethod
    def of(cls, order: Order) -> Asked:
        """One that begins now."""
        until = None if order.deadline is None else time.monotonic() + order.deadline
        return cls(order, until, list(order.said))

    def now(self) -> Order:
        """What is left of it."""
        left = None if self.until is None else max(self.until - time.monotonic(), 1e-3)
        return replace(self.order, said=tuple(self.said), deadline=left)


class ServerMember:
    """One server, served by an event loop in a thread of its own."""

    def __init__(self, backend: Backend, events: Events, config: FleetConfig, delivery: WeightDelivery | None) -> None:
        self.facts = Facts(0, Limits(backend.vocab_size, backend.max_model_len, 1 << 60, 0.0), None)
        self.version = 0
        self._backend, self._events, self._config, self._delivery = backend, events, config, delivery
        self._asked: dict[int, Asked] = {}
        """What runs, by the number of the order."""
        self._waiting = False
        """Whether requests wait until new weights are there."""
        self._heard = time.monotonic()
        self._unwell: float | None = None
        """Since when it was never well, as often as it was asked."""
        self._complaint = "does not answer"
        """What was wrong when it was asked last, if anything."""
        self._closing, self._lock = False, threading.Lock()
        self._in_requests_thread = OneThread()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="glm5-server-member", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the server answers; raises `FleetError` when it does not soon: no weights are loaded here. It is
        tried again as often as the outage that is borne takes."""
        try:
            self._run(self._answers()).result(min(self._config.start_seconds, START_SECONDS))
        except TimeoutError:
            self.close(kill=True)
            raise FleetError(
                f"the server at {self._backend.url} {self._complaint}; start it, or look at its log"
            ) from None
        self._run(self._ask_on())

    # ---- Member -------------------------------------------------------------------------------------------------
    def begin(self, order: Order) -> None:
        """Starts a request."""
        self._loop.call_soon_threadsafe(self._begin, Asked.of(order))

    def abort(self, number: int) -> None:
        """Ends a request."""
        self._loop.call_soon_threadsafe(self._stop, number)

    def update(self, version: int) -> Future[int]:
        """Brings the newest weights there."""
        return self._run(self._update(version))

    def trouble(self, stood_still: float) -> str | None:
        """Silence, or bad health. While it reads weights, which has a time limit of its own, it need not answer."""
        if self._waiting:  # looked at first: what else is here may be from before
            return None
        now, unwell = time.monotonic(), self._unwell
        self._heard = min(self._heard + stood_still, now)
        if stood_still and unwell is not None:
            unwell = self._unwell = min(unwell + stood_still, now)
        if unwell is not None and now - unwell > UNWELL_SECONDS:
            return f"{self._backend.url} {self._complaint}"
        if now - self._heard > self._config.silence_seconds:
            return f"{self._backend.url} says nothing for {now - self._heard:.0f} s"
        return None

    def stats(self) -> EngineStats | None:
        """Not known."""
        return None

    def close(self, *, kill: bool) -> None:
        """Ends the requests and the thread, not the server."""
        with self._lock:
            first, self._closing = not self._closing, True
        if first:
            self._run(self._end())
        self._thread.join(self._config.silence_seconds)

    # ---- in the loop --------------------------------------------------------------------------------------------
    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _client(self, seconds: float) -> httpx.AsyncClient:
        client = self._backend.client(httpx.Timeout(seconds))
        client.base_url = httpx.URL(self._backend.url)
        client.headers.update({**self._backend.headers, "Connection": "close"})  # an old one says nothing of today
        return client

    async def _ask(self, client: httpx.AsyncClient) -> bool:
        """Whether the server is well. One without the endpoint is, if it answers."""
        try:
            status = (await client.get("/health")).status_code
            self._complaint = "" if status < 500 else f"answers {status} to /health"
        except httpx.HTTPError:
            self._complaint = "does not answer"
        if not self._complaint:
            self._heard, self._unwell = time.monotonic(), None
        elif self._unwell is None:
            self._unwell = time.monotonic()
        return not self._complaint

    async def _answers(self) -> None:
        async with self._client(self._config.silence_seconds) as client:
            while not await self._ask(client):
                await asyncio.sleep(ASK_SECONDS)

    async def _ask_on(self) -> None:
        async with self._client(self._config.silence_seconds) as client:
            while True:
                await self._ask(client)
                await asyncio.sleep(ASK_SECONDS)

    def _begin(self, asked: Asked) -> None:
        self._asked[asked.order.number] = asked
        if not self._waiting and not self._closing:
            asked.task = self._loop.create_task(self._stream(asked))

    def _stop(self, number: int) -> None:
        asked = self._asked.pop(number, None)
        if asked is not None and asked.task is not None:
            asked.task.cancel()

    async def _stream(self, asked: Asked) -> None:
        """One request. Trouble with the server is the server's, all else the request's."""
        try:
            try:
                if not any(delta.finish_reason for delta in asked.said):
                    await self._tokens(asked)
                self._ended(asked, None)
            except GLM5Error as error:
                await self._failed(asked, error)
        except Exception as error:  # a mistake of ours: nobody may wait for it
            self._ended(asked, FleetError(f"The answer of {self._backend.url} cannot be read ({error!r})."))

    async def _failed(self, asked: Asked, error: GLM5Error) -> None:
        """A request came to no end. What is refused while others are taken is tried again for a while, then elsewhere;
        no other request is disturbed by it."""
        status = error.status if isinstance(error, ApiError) else 400
        if status == 504:  # its own deadline
            self._ended(asked, None)
        elif status < 500:
            self._ended(asked, error)
        elif isinstance(error, BackendAway) or not await self._takes_others(asked.order):
            self._events.lost(self, str(error))
        else:
            if asked.pauses is None:
                asked.pauses, asked.refused_with = pauses(REFUSED_SECONDS), len(asked.said)
            pause = next(asked.pauses, None)
            if pause is None:
                self._ended(asked, RequestFailed(f"{self._backend.url} takes other requests, but of this one: {error}"))
            else:
                await asyncio.sleep(pause)
                self._begin(asked)

    async def _takes_others(self, order: Order) -> bool:
        """Whether the server is well, and answers a request that could hardly be smaller."""
        async with self._client(self._config.silence_seconds) as client:
            if not await self._ask(client):
                return False
        small = Order(0, order.prompt_ids[:1], SamplingParams(max_tokens=1), None, order.priority, None, ())
        try:
            async with (
                asyncio.timeout(self._config.silence_seconds),
                contextlib.aclosing(await self._sent(small)) as answer,
            ):
                return [delta async for delta in answer] != []
        except TimeoutError:
            return False
        except ApiError as error:
            return error.status < 500

    async def _tokens(self, asked: Asked) -> None:
        async with contextlib.aclosing(await self._taken(asked)) as stream:
            async for delta in stream:
                self._delivered(asked, delta, stream.cached_tokens)

    async def _taken(self, asked: Asked) -> BackendStream:
        """The answer of the server, once it takes the request."""
        while True:
            try:
                return await self._sent(asked.now())
            except ApiError as failure:
                if failure.status != 429:
                    raise
            await asyncio.sleep(BUSY_SECONDS)

    async def _sent(self, order: Order) -> BackendStream:
        """The answer of the server, if it takes the request now."""
        stream = await self._in_requests_thread(  # replays all that was said: long work
            self._backend.request, order.prompt_ids, order.params, session_id=order.session_id,
            priority=order.priority, deadline=order.deadline, said=order.said,
        )  # fmt: skip
        await stream.open()
        return stream

    def _delivered(self, asked: Asked, delta: TokenDelta, cached_tokens: int) -> None:
        self._heard = time.monotonic()
        if self._delivery is not None and self._delivery.interrupts:
            delta = replace(delta, version=self.version)
        asked.said.append(delta)
        if len(asked.said) - asked.refused_with > FEW:
            asked.pauses = None
        self._events.delivered(self, [Delivery(asked.order.number, [delta], cached_tokens, None)])

    async def _update(self, version: int) -> int:
        if self._delivery is None:
            raise FleetError("These servers keep their weights; give the executor a way to deliver new ones.")
        self._waiting = self._delivery.interrupts
        for asked in self._asked.values() if self._waiting else ():
            if asked.task is not None:
                asked.task.cancel()
                asked.task = None
        try:
            async with self._client(self._config.update_seconds) as client:
                self.version = await self._delivery.arrive(client, version)
        except httpx.HTTPError as error:
            raise FleetError(f"The server at {self._backend.url} took no weights ({type(error).__name__}).") from None
        self._go_on()  # not after an error: then they go on elsewhere
        return self.version

    def _go_on(self) -> None:
        """Begins the requests that have waited for weights, those that were interrupted after what they have said."""
        self._heard, self._unwell = time.monotonic(), None
        self._waiting = False  # last: `trouble` looks from another thread
        for asked in list(self._asked.values()):
            if asked.task is None:
                self._begin(asked)

    def _ended(self, asked: Asked, error: BaseException | None) -> None:
        self._asked.pop(asked.order.number, None)
        self._events.ended(self, asked.order.number, error)

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._in_requests_thread.close()
        await self._loop.shutdown_asyncgens()
        self._loop.stop()


class ServerExecutor:
    """The servers at `backends`, one for each seat: the fleet's size is their number."""

    def __init__(self, backends: Sequence[Backend], delivery: WeightDelivery | None = None) -> None:
        self.backends, self.delivery = list(backends), delivery
        self.outlived = delivery is not None

    def launch(self, name: str, events: Events, config: FleetConfig) -> ServerMember:
        """The server of the seat, whether it answers yet or not."""
        return ServerMember(self.backends[int(name)], events, config, self.delivery)

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the weights to where the servers find them."""
        if self.delivery is None:
            raise FleetError("These servers keep their weights; give the executor a way to deliver new ones.")
        self.delivery.snapshot(version, tensors)

    def close(self) -> None:
        """The servers are not ours to end."""
