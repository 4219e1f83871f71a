"""The HTTP application: `POST /v1/chat/completions`, `GET /v1/models`, `GET /health`.

The engine samples in a worker thread, one token per turn, so that requests interleave and a client that goes away
stops its work at the next token. The app knows nothing of training; it serves whatever weights the engine has.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.types import Receive, Scope, Send

from glm5.engine import Engine, TokenDelta, TokenStream
from glm5.errors import GLM5Error
from glm5.serve.chat import ChatCompletion
from glm5.serve.errors import ApiError, error_body, error_status, install_error_handlers
from glm5.serve.limits import BodyLimit, Gate, Limits
from glm5.serve.page import install_page
from glm5.serve.schema import ChatRequest
from glm5.text import Tokenizer

log = logging.getLogger("glm5.serve")
DISCONNECT_CHECK_TOKENS = 8

Recorder = Callable[[ChatCompletion], None]
"""Called with each finished completion (its `prompt_ids` and `tokens`): how a caller keeps what was sampled."""


def create_app(
    engine: Engine,
    *,
    model_name: str = "glm5",
    limits: Limits | None = None,
    recorder: Recorder | None = None,
) -> FastAPI:
    """The ASGI application over one engine. The engine must have a tokenizer."""
    if engine.tokenizer is None:
        raise GLM5Error("The server needs a tokenizer; give a model directory that holds tokenizer.json.")
    tokenizer: Tokenizer = engine.tokenizer
    limits = limits or Limits()
    gate = Gate(limits.max_concurrent)
    created = int(time.time())
    app = FastAPI(title="glm5", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    install_error_handlers(app)
    install_page(app)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "model": model_name, "weight_version": engine.version, "running": gate.running}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        model = {"id": model_name, "object": "model", "created": created, "owned_by": "glm5"}
        return {"object": "list", "data": [{**model, "max_model_len": engine.max_model_len}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> JSONResponse | StreamingResponse:
        if body.model != model_name:
            raise ApiError(
                404, f"The model {body.model!r} is not served here; ask for {model_name!r}.", param="model",
                code="model_not_found",
            )  # fmt: skip
        if len(body.messages) > limits.max_messages or (body.n or 1) > limits.max_n:
            raise ApiError(
                400, f"At most {limits.max_messages} messages and n = {limits.max_n} are accepted; send less."
            )
        gate.enter()
        try:
            completion = await run_in_threadpool(ChatCompletion, body, engine, tokenizer, model_name)
            tokens = completion.start()
        except BaseException:
            gate.leave()
            raise
        if body.stream:
            return _EventStream(_events(completion, tokens, recorder), gate)
        try:
            async with aclosing(_in_thread(tokens)) as steps:
                count = 0
                async for token in steps:
                    completion.take(token)
                    count += 1
                    if count % DISCONNECT_CHECK_TOKENS == 0 and await request.is_disconnected():
                        raise ApiError(499, "The client went away.")
        finally:
            gate.leave()
        if recorder:
            recorder(completion)
        return JSONResponse(completion.reply())

    return app


class _EventStream(StreamingResponse):
    """Server-sent events that give their place back however they end, even before the first one."""

    def __init__(self, events: AsyncIterator[str], gate: Gate) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.gate.leave()


async def _in_thread(tokens: TokenStream) -> AsyncGenerator[TokenDelta, None]:
    """The engine's iterator, each step in a worker thread; it is closed (and so aborted) when the consumer leaves."""
    try:
        async for token in iterate_in_threadpool(tokens):
            yield token
    finally:
        tokens.close()


async def _events(completion: ChatCompletion, tokens: TokenStream, recorder: Recorder | None) -> AsyncIterator[str]:
    """The server-sent events of a streamed reply, ending in `[DONE]`; a failure on the way is one error event."""
    try:
        for chunk in completion.opening():
            yield _event(chunk)
        async with aclosing(_in_thread(tokens)) as steps:
            async for token in steps:
                for chunk in completion.chunks(token):
                    yield _event(chunk)
        if recorder:
            recorder(completion)
        options = completion.request.stream_options
        if options is not None and options.include_usage:
            yield _event(completion.usage_chunk())
        yield "data: [DONE]\n\n"
    except GLM5Error as error:
        yield _event(error_body(error_status(error), str(error)))
    except Exception:
        log.exception("a streamed request failed")
        yield _event(error_body(500, "The server failed on this request; its log has the reason."))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
