"""From a request to a response, the same way for every protocol.

`Service.answer` takes a place, prepares the work off the event loop, and gives the reply whole or as server-sent
events. A protocol only says, in its `Reply`, what the events and the whole reply look like. A client that goes away
stops the work at once, in both forms.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
from anyio.to_thread import run_sync
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from glm5.engine import SamplingDefaults, SamplingParams, StructuredOutputs
from glm5.engine.admission import check_queueing
from glm5.engine.grammar import GrammarCompiler
from glm5.engine.scheduler import PRIORITY_SECONDS
from glm5.errors import GLM5Error
from glm5.serve.encoding import LargeResponse, encoded
from glm5.serve.ending import Endings, disconnected, unless_disconnected
from glm5.serve.errors import FAILED, ApiError, error_status
from glm5.serve.event_stream import EventStream
from glm5.serve.gate import Gate, Place, done_while_there
from glm5.serve.generation import Generation, Source, Step
from glm5.serve.limits import Limits, deadline_of
from glm5.serve.structure import with_calls_as_allowed
from glm5.text import Tokenizer, Written, spliced_prompt
from glm5.text.template import EFFORTS, takes_effort

log = logging.getLogger("glm5.serve")

Body = dict[str, Any]
LARGE = 4096
"""Values in a plain reply that are put together by the event loop itself; about 20 ms."""
PREPARERS = 32
"""Requests that are prepared at once."""
PATIENCE_SECONDS = 0.25
"""How long a request keeps its place while a new grammar is compiled, which takes milliseconds as a rule."""


class Recorder(Protocol):
    """Keeps what was sampled, for a caller that learns from it. Any method may raise `ApiError` to refuse a request."""

    def begin(self, session_id: str | None) -> None:
        """A request came, of this session if it names one. Called from the event loop, as `ended`."""

    def written(self, session_id: str, messages: Sequence[Mapping[str, Any]]) -> Mapping[int, Written]:
        """The answers among the messages, by number, that were sampled in this session. Called from any thread."""

    def ended(self, generation: Generation) -> None:
        """A generation is over, by itself or because it was called off: once for each that was started."""


class Reply(Protocol):
    """One protocol's words for one generation. Each method that gives events gives their JSON bodies."""

    generation: Generation

    def opening(self) -> Iterable[Body]:
        """Before the first token."""

    def step(self, step: Step) -> Iterable[Body]:
        """What one token adds."""

    def closing(self) -> Iterable[Body]:
        """After the last token."""

    def failure(self, status: int, message: str) -> Body:
        """An error after the response began."""

    def whole(self) -> Body:
        """The plain reply, after the last token."""

    def encode(self, body: Body) -> str:
        """An event as it is sent: `data_event` or `named_event`."""

    end: str
    """What ends a stream that did not fail: `DONE` or nothing."""
    pause: str
    """What a stream says when there is nothing to say for long: `COMMENT` or `PING`."""


DONE = "data: [DONE]\n\n"


def data_event(body: Body) -> str:
    """An event without a name, as OpenAI's older endpoints send it."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def named_event(body: Body) -> str:
    """An event named by its own `type`."""
    return f"event: {body['type']}\n{data_event(body)}"


@dataclass
class Service:
    """What all endpoints of one server share."""

    source: Source
    tokenizer: Tokenizer
    model_name: str
    limits: Limits
    recorder: Recorder | None = None
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Of sampling, where a request names none. `/inference/v1/generate` has none: what it does is what it was told."""
    aliases: tuple[str, ...] = ()
    """More names that the model may be asked for by."""
    created: int = field(default_factory=lambda: int(time.time()))
    gate: Gate = field(init=False)
    endings: Endings = field(default_factory=Endings, init=False)

    def __post_init__(self) -> None:
        self.gate = Gate(self.limits.max_concurrent, self.limits.max_waiting)
        # Threads of their own for what may take long: odd prompts and tools, new grammars, one after the other, and a
        # backend that is busy.
        self._preparers = ThreadPoolExecutor(PREPARERS, "glm5-prompts")
        self._compiler = ThreadPoolExecutor(1, "glm5-grammars")
        self._starters = anyio.CapacityLimiter(max(1, self.limits.max_concurrent))

    @property
    def names(self) -> tuple[str, ...]:
        """What the model may be asked for by; replies say the first."""
        return (self.model_name, *self.aliases)

    def check_model(self, name: str | None) -> None:
        """Refuses any other model by name; endpoints that may leave it out pass None."""
        if name is not None and name not in self.names:
            names = " or ".join(map(repr, self.names))
            raise ApiError(
                404, f"The model {name!r} is not served here; ask for {names}.", param="model", code="model_not_found"
            )

    async def answer(
        self, request: Request, prepare: Callable[[], Reply], *, stream: bool, priority: int = 0
    ) -> Response:
        """Runs one request. `prepare` renders the prompt, in a worker thread; errors leave as the app's handlers do.

        The deadline counts from here: the wait for a place, rendering and compiling are part of it.
        """
        check_queueing(None, priority, None)
        arrival = time.monotonic()
        seconds = deadline_of(request.headers, self.limits)
        until = None if seconds is None else arrival + seconds
        if self.recorder is not None:
            self.recorder.begin(request.headers.get("x-session-id"))
        place = Place(self.gate, lambda: disconnected(request), arrival + PRIORITY_SECONDS * priority)
        taking = asyncio.ensure_future(place.take())
        try:
            if stream and await self._waits(taking, until):
                return await self._early(request, prepare, place, taking, until)
            await self.endings.in_time(taking, until)
            reply = await self._prepared(prepare, until)
            await self._start(reply, request, place, until)
            if stream:
                return EventStream(
                    self._events(reply), lambda: self._leave(reply, place), reply.pause, self.limits.pause_seconds
                )
            try:
                await unless_disconnected(request, lambda: self._finish(reply))
            finally:
                reply.generation.close()
                self._ended(reply.generation)
            if _values(reply.generation) >= LARGE:
                return LargeResponse(await run_sync(lambda: encoded(reply.whole())), place.leave)
        except BaseException:
            taking.cancel()
            place.leave()
            raise
        place.leave()
        return JSONResponse(reply.whole())

    async def _waits(self, taking: asyncio.Future[None], until: float | None) -> bool:
        """Whether a request still waits for its place when a sign of life is due."""
        await self.endings.in_time(asyncio.wait({taking}, timeout=self.limits.pause_seconds), until)
        return not taking.done()

    async def _early(
        self, request: Request, prepare: Callable[[], Reply], place: Place, taking: asyncio.Future[None],
        until: float | None,
    ) -> EventStream:  # fmt: skip
        """A stream that begins before there is a place for its work: its prompt is in order, all else is an event."""
        reply = await self._prepared(prepare, until)

        async def events() -> AsyncIterator[str]:
            try:
                await self.endings.in_time(taking, until)
                await self._start(reply, request, place, until)
            except GLM5Error as error:
                yield reply.encode(reply.failure(error_status(error), str(error)))
                return
            except Exception:
                log.exception("a streamed request failed")
                yield reply.encode(reply.failure(500, FAILED))
                return
            async with aclosing(self._events(reply)) as answer:
                async for event in answer:
                    yield event

        def leave() -> None:
            taking.cancel()
            self._leave(reply, place)

        return EventStream(events(), leave, reply.pause, self.limits.pause_seconds)

    async def _prepared(self, prepare: Callable[[], Reply], until: float | None) -> Reply:
        """What `prepare` gives, in time. The thread of one that is given up is free again when `prepare` ends."""
        preparing = asyncio.get_running_loop().run_in_executor(self._preparers, prepare)
        await self.endings.in_time(preparing, until)
        return preparing.result()

    async def _start(self, reply: Reply, request: Request, place: Place, until: float | None) -> None:
        """Compiles what is to be compiled, and asks the source."""
        await self.endings.in_time(self._compile(reply.generation.params.structured_outputs, place), until)
        await run_sync(reply.generation.start, until, limiter=self._starters)
        self.endings.running.add(reply.generation)
        request.state.generation = reply.generation  # its figures go to the log and the metrics

    async def _compile(self, outputs: StructuredOutputs | None, place: Place) -> None:
        """Compiles a grammar before its request starts. One that takes long does not keep others from running."""
        grammars = self._grammars
        if outputs is None or grammars is None or grammars.has(outputs):
            return
        left = threading.Event()
        wanted = lambda: not left.is_set()
        compiling = asyncio.get_running_loop().run_in_executor(self._compiler, grammars.compile, outputs, wanted)
        try:
            if not await done_while_there(compiling, place.disconnected, PATIENCE_SECONDS):
                async with place.aside():
                    await done_while_there(compiling, place.disconnected)
                    await compiling  # a refusal waits for no place
            await compiling
        finally:  # of a request that is given up, begun or not
            left.set()
            compiling.cancel()

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], session_id: str | None, tools: Sequence[Mapping[str, Any]] | None,
        *, enable_thinking: bool, clear_thinking: bool | None = None, reasoning_effort: str | None = None,
        effort: str | None = None,
    ) -> list[int]:  # fmt: skip
        """The prompt of a conversation. Answers that the recorder knows stand in it as the tokens that were sampled.

        effort: how much an API asks the model to think, for templates that say so to it; `reasoning_effort` says it to
        any. (To this project's own template it would mean another form, which its models have not learnt.)
        What a client sends is text: a special token inside it must not speak as another role. Raises `TextError`.
        """
        if reasoning_effort is None and effort in EFFORTS and takes_effort(self.tokenizer.chat_template):
            reasoning_effort = effort
        known = session_id is not None and self.recorder is not None
        written = self.recorder.written(session_id, messages) if known else {}  # type: ignore[union-attr, arg-type]
        return spliced_prompt(
            self.tokenizer, messages, written, tools, enable_thinking=enable_thinking, clear_thinking=clear_thinking,
            reasoning_effort=reasoning_effort,
        )  # fmt: skip

    def under_tools(
        self, params: SamplingParams, tools: Sequence[Mapping[str, Any]], *, parallel: bool, thinking: bool
    ) -> SamplingParams:
        """The settings of a request whose prompt shows these tools (`with_calls_as_allowed`)."""
        return with_calls_as_allowed(
            params, self.tokenizer, tools, parallel=parallel, thinking=thinking, exact=self.recorder is not None,
            grammars=self._grammars is not None,
        )  # fmt: skip

    @property
    def _grammars(self) -> GrammarCompiler | None:
        """The source's, unless it is another server."""
        return getattr(self.source, "grammars", None)

    def _leave(self, reply: Reply, place: Place) -> None:
        reply.generation.close()
        place.leave()
        self._ended(reply.generation)

    async def _finish(self, reply: Reply) -> None:
        async with aclosing(reply.generation.steps()) as steps:
            async for _ in steps:
                pass

    async def _events(self, reply: Reply) -> AsyncGenerator[str, None]:
        try:
            for body in reply.opening():
                yield reply.encode(body)
            async with aclosing(reply.generation.steps()) as steps:
                async for step in steps:
                    pieces = [reply.encode(body) for body in reply.step(step)]
                    if pieces:
                        yield "".join(pieces)
            self._ended(reply.generation)  # before the client may act on the answer
            yield "".join(map(reply.encode, reply.closing())) + reply.end
        except GLM5Error as error:
            yield reply.encode(reply.failure(error_status(error), str(error)))
        except Exception:
            log.exception("a streamed request failed")
            yield reply.encode(reply.failure(500, FAILED))

    def _ended(self, generation: Generation) -> None:
        """It samples no more; tells the recorder, once."""
        self.endings.running.discard(generation)
        if self.recorder is not None and generation.started and not generation.ended:
            generation.ended = True
            self.recorder.ended(generation)


def _values(generation: Generation) -> int:
    """About how many values the plain reply holds; a prompt may stand in it once for each of its samples."""
    params = generation.params
    read = generation.prompt_tokens * params.n * (1 if params.prompt_logprobs is None else 2 + params.prompt_logprobs)
    return read + generation.completion_tokens * (1 + (params.logprobs or 0))
