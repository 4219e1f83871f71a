"""Other servers as the engines of a fleet: glm5, vLLM and SGLang endpoints that take and give token ids.

Tokens go through `glm5.serve.backend.Backend`. A server that is away is a seat that is empty until it answers again;
its requests go on at another one, with their tokens so far as prompt. How weights get there is a `WeightDelivery`:

* `Polled`: the fleet publishes a directory of versions and `glm5 serve --weights-from DIRECTORY` looks there. Tokens
  carry the version that the server says.
* `Reloaded`: SGLang's `/update_weights_from_disk` with a model directory. It does not say which weights made a token,
  so requests are interrupted before the reload and go on after it: every token's version is certain.
* None: the servers keep their weights, as teachers and judges do.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import anyio.to_thread
import httpx
import torch
from torch import Tensor

from glm5.checkpoint import save_model
from glm5.config import ModelConfig
from glm5.engine import EngineStats, TokenDelta
from glm5.engine.admission import Limits
from glm5.errors import FleetError, GLM5Error
from glm5.model import GLM5
from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.job import Delivery, Order
from glm5.rl.fleet.member import Events, Facts
from glm5.rl.weights import DirectoryPublisher
from glm5.rl.weights.directory import MODEL_PREFIX, versions
from glm5.serve.backend import Backend
from glm5.serve.errors import ApiError
from glm5.text import Tokenizer

ASK_SECONDS = 0.25
"""Between two questions for a server's health or version."""
BUSY_SECONDS = 1.0
"""Before a server that answered 429 is asked again."""
START_SECONDS = 10.0
"""For which a server is at least asked whether it is there, before that counts as a failure."""


class WeightDelivery(Protocol):
    """How weights reach a server."""

    interrupts: bool
    """Whether requests stop before and go on after, because the server does not say which weights made a token."""

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a version."""

    async def arrive(self, client: httpx.AsyncClient, version: int) -> int:
        """Returns the server's version, at least this one, once it has it. Raises `FleetError`."""


class Polled:
    """A directory of versions that `glm5 serve --weights-from` polls."""

    interrupts = False

    def __init__(self, publisher: DirectoryPublisher) -> None:
        self.publisher = publisher

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Publishes it there."""
        self.publisher.publish(version, tensors)

    async def arrive(self, client: httpx.AsyncClient, version: int) -> int:
        """Asks the server for its version until it is there; the fleet's time limit ends the wait."""
        while True:
            models = (await client.get("/v1/models")).raise_for_status().json()
            has = int(models["data"][0]["weight_version"])
            if has >= version:
                return has
            await asyncio.sleep(ASK_SECONDS)


class Reloaded:
    """Model directories below `path`, which the servers can read too; the newest two are kept."""

    interrupts = True

    def __init__(self, path: str | Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.path, self.tokenizer = Path(path).resolve(), tokenizer
        with torch.device("meta"):
            self._model = GLM5(config)
        self._written = [self._directory(version) for version in versions(self.path, MODEL_PREFIX)]
        """Also those of before the run was resumed."""

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a model directory."""
        directory = self._directory(version)
        save_model(self._model, directory, self.tokenizer, state=tensors)
        *older, last = [*(written for written in self._written if written != directory), directory]
        for old in older[:-1]:
            shutil.rmtree(old, ignore_errors=True)
        self._written = [*older[-1:], last]

    async def arrive(self, client: httpx.AsyncClient, version: int) -> int:
        """Tells the server to read it."""
        body = {"model_path": str(self._directory(version))}
        reply = await client.post("/update_weights_from_disk", json=body)
        if reply.status_code != 200 or not reply.json().get("success", True):
            raise FleetError(f"The server at {client.base_url} refuses weights version {version}: {reply.text[:300]}")
        return version

    def _directory(self, version: int) -> Path:
        return self.path / f"{MODEL_PREFIX}{version:08d}"


class ServerMember:
    """One server, served by an event loop in a thread of its own."""

    def __init__(self, backend: Backend, events: Events, config: FleetConfig, delivery: WeightDelivery | None) -> None:
        self.facts = Facts(0, Limits(backend.vocab_size, backend.max_model_len, 1 << 60, 0.0), None)
        self.version = 0
        self._backend, self._events, self._config, self._delivery = backend, events, config, delivery
        self._orders: dict[int, Order] = {}
        """What runs, with the tokens that it was begun with."""
        self._said: dict[int, list[TokenDelta]] = {}
        """All tokens that it has."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._heard = time.monotonic()
        self._closing, self._lock = False, threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="glm5-server-member", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the server answers; raises `FleetError` when it does not within the time of one try.

        All tries of a seat together take about the outage that is borne: we wait for no weights to be loaded here.
        """
        share = self._config.outage_seconds / (self._config.max_restarts + 1)
        try:
            self._run(self._answers()).result(min(self._config.start_seconds, max(share, START_SECONDS)))
        except TimeoutError:
            self.close(kill=True)
            raise FleetError(f"the server at {self._backend.url} does not answer; start it") from None
        self._run(self._ask_on())

    # ---- Member -------------------------------------------------------------------------------------------------
    def begin(self, order: Order) -> None:
        """Starts a request."""
        self._loop.call_soon_threadsafe(self._begin, order)

    def abort(self, number: int) -> None:
        """Ends a request."""
        self._loop.call_soon_threadsafe(self._stop, number)

    def update(self, version: int) -> Future[int]:
        """Brings the newest weights there."""
        return self._run(self._update(version))

    def trouble(self) -> str | None:
        """Silence."""
        silent = time.monotonic() - self._heard
        return f"{self._backend.url} says nothing for {silent:.0f} s" if silent > self._config.silence_seconds else None

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

    def _client(self) -> httpx.AsyncClient:
        backend = self._backend
        return httpx.AsyncClient(base_url=backend.url, headers=backend.headers, transport=backend.transport,
                                 timeout=self._config.silence_seconds, trust_env=False)  # fmt: skip

    async def _healthy(self) -> bool:
        try:
            async with self._client() as client:
                return (await client.get("/health")).status_code == 200
        except httpx.HTTPError:
            return False

    async def _answers(self) -> None:
        while not await self._healthy():
            await asyncio.sleep(ASK_SECONDS)

    async def _ask_on(self) -> None:
        while True:
            if await self._healthy():
                self._heard = time.monotonic()
            await asyncio.sleep(ASK_SECONDS)

    def _begin(self, order: Order) -> None:
        self._orders[order.number] = order
        self._said[order.number] = list(order.said)
        self._tasks[order.number] = self._loop.create_task(self._stream(order))

    def _stop(self, number: int) -> None:
        self._orders.pop(number, None)
        self._said.pop(number, None)
        task = self._tasks.pop(number, None)
        if task is not None:
            task.cancel()

    async def _stream(self, order: Order) -> None:
        """One request. Trouble with the server is the server's, all else the request's."""
        try:
            if not any(delta.finish_reason for delta in order.said):
                await self._tokens(order)
            self._ended(order, None)
        except GLM5Error as error:
            if isinstance(error, ApiError) and error.status >= 500:
                self._events.lost(self, str(error))
            else:
                self._ended(order, error)
        except Exception as error:  # a mistake of ours: nobody may wait for it
            self._ended(order, FleetError(f"The answer of {self._backend.url} cannot be read ({error!r})."))

    async def _tokens(self, order: Order) -> None:
        begin = partial(
            self._backend.stream, order.prompt_ids, order.params, session_id=order.session_id,
            priority=order.priority, deadline=order.deadline, said=order.said,
        )  # fmt: skip
        while True:
            try:
                stream = await anyio.to_thread.run_sync(begin, abandon_on_cancel=True)
                break
            except ApiError as failure:
                if failure.status != 429:
                    raise
                await asyncio.sleep(BUSY_SECONDS)
        try:
            async for delta in stream:
                self._delivered(order.number, delta, stream.cached_tokens)
        finally:
            await stream.aclose()

    def _delivered(self, number: int, delta: TokenDelta, cached_tokens: int) -> None:
        self._heard = time.monotonic()
        if self._delivery is not None and self._delivery.interrupts:
            delta = replace(delta, version=self.version)
        self._said[number].append(delta)
        self._events.delivered(self, [Delivery(number, [delta], cached_tokens, None)])

    async def _update(self, version: int) -> int:
        if self._delivery is None:
            raise FleetError("These servers keep their weights; give the executor a way to deliver new ones.")
        interrupted = list(self._orders.values()) if self._delivery.interrupts else []
        for order in interrupted:
            self._tasks.pop(order.number).cancel()
        try:
            async with self._client() as client:
                client.timeout = httpx.Timeout(self._config.update_seconds)
                self.version = await self._delivery.arrive(client, version)
        except httpx.HTTPError as error:
            raise FleetError(f"The server at {self._backend.url} took no weights ({type(error).__name__}).") from None
        finally:
            for order in interrupted:
                if order.number in self._orders:
                    self._begin(replace(order, said=tuple(self._said[order.number])))
        return self.version

    def _ended(self, order: Order, error: BaseException | None) -> None:
        self._orders.pop(order.number, None)
        self._said.pop(order.number, None)
        self._tasks.pop(order.number, None)
        self._events.ended(self, order.number, error)

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
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
