"""`POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's API over the core that all protocols share.

Forced calls (`any`, `tool`) and JSON answers are held by a grammar. At most one call (`disable_parallel_tool_use`)
is held by the grammar where there is one, and by ending after the first `</tool_call>` where there is none.

`max_tokens` beyond the context is cut to what is left, and an answer that ends there says so
(`model_context_window_exceeded`), as newer models of Anthropic do: their clients ask for tens of thousands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from glm5.engine import SamplingParams, StructuredOutputs
from glm5.errors import InputError
from glm5.serve.anthropic_prompt import chat_messages
from glm5.serve.anthropic_schema import CountTokensRequest, MessagesRequest
from glm5.serve.content_blocks import ContentBlocks, Event
from glm5.serve.errors import GIVEN_UP, ApiError, anthropic_error_body
from glm5.serve.event_stream import PING
from glm5.serve.generation import Generation, Step
from glm5.serve.service import Service, named_event
from glm5.serve.structure import Structure, as_held
from glm5.text import AssistantStream

DEFAULT_BUDGET = 1024
"""Reasoning tokens before a structured answer when the client names no budget."""


def install_messages(app: FastAPI, service: Service) -> None:
    """Adds both endpoints."""

    @app.post("/v1/messages", response_model=None)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        _check(body, service)
        session = request.headers.get("x-session-id")
        return await service.answer(request, lambda: MessagesReply(body, service, session), stream=body.stream)

    @app.post("/v1/messages/count_tokens", response_model=None)
    async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
        _check(body, service)
        asked = await run_in_threadpool(Asked, body, service, request.headers.get("x-session-id"))
        return JSONResponse({"input_tokens": len(asked.prompt)})


def _check(body: CountTokensRequest, service: Service) -> None:
    service.check_model(body.model)
    if len(body.messages) > service.limits.max_messages:
        raise ApiError(400, f"At most {service.limits.max_messages} messages are accepted; send fewer.")
    if body.thread is not None:
        unsupported = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise ApiError(
            400, "This server holds no conversations; leave thread out and send all messages.", details=unsupported
        )


class Asked:
    """What a request asks. Raises `TextError`."""

    def __init__(self, request: CountTokensRequest, service: Service, session_id: str | None) -> None:
        self.messages, self.prefill = chat_messages(request)
        """The conversation, and the text that begins the answer."""
        ids = service.prompt(
            self.messages, session_id, request.visible_tools or None, enable_thinking=request.enable_thinking,
            clear_thinking=False, effort=request.output_config.effort,
        )  # fmt: skip
        self.prompt = ids + service.tokenizer.encode(self.prefill, allow_special=False)


class MessagesReply:
    """The reply to one request. Raises `GLM5Error` when it cannot be rendered or forced."""

    end = ""
    pause = PING

    def __init__(self, request: MessagesRequest, service: Service, session_id: str | None) -> None:
        self.request, self.service = request, service
        asked = Asked(request, service, session_id)
        prompt, self.prefill = asked.prompt, asked.prefill
        limit = service.source.max_model_len
        if len(prompt) >= limit:
            raise InputError(f"prompt is too long: {len(prompt)} tokens > {limit - 1} maximum; send a shorter one.")
        self.cut = request.max_tokens > limit - len(prompt)
        params, thinking = self._params(min(request.max_tokens, limit - len(prompt))), request.enable_thinking
        tools = as_held(request.visible_tools, params.structured_outputs)
        self.generation = Generation(
            service.source,
            [prompt],
            params,
            parser=lambda seed: AssistantStream(tools, thinking, seed, bool(tools), bool(self.prefill)),
            session_id=session_id,
            messages=asked.messages,
        )
        self.blocks = ContentBlocks()

    def _params(self, max_tokens: int) -> SamplingParams:
        request = self.request
        params = SamplingParams(
            max_tokens=max_tokens,
            stop=request.stop_sequences,
            structured_outputs=self._structure(max_tokens),
            **self.service.defaults.under(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k),
        )
        parallel = not request.tool_choice.disable_parallel_tool_use
        return self.service.under_tools(
            params, request.visible_tools, parallel=parallel, thinking=request.enable_thinking
        )

    def _structure(self, max_tokens: int) -> StructuredOutputs | None:
        """The grammar of a forced call or of a JSON answer."""
        request, choice = self.request, self.request.tool_choice
        form = request.output_config.format
        forced = choice.type in ("any", "tool")
        if not forced and form is None:
            return None
        if self.prefill:
            raise InputError("A forced call or a JSON answer cannot begin with text of the assistant; leave it out.")
        named = [tool for tool in request.visible_tools if choice.name in (None, tool["function"]["name"])]
        calls = "one" if choice.disable_parallel_tool_use or choice.type == "tool" else "many"
        structure = Structure(
            answer=None if forced or form is None else form.json_schema,
            tools=named,
            calls=calls if forced or named else "none",  # type: ignore[arg-type]
        )
        budget = min(request.thinking.budget_tokens or DEFAULT_BUDGET, max_tokens // 2)
        return structure.outputs(thinking=request.enable_thinking, reasoning_tokens=budget)

    # ---- the plain reply ----------------------------------------------------------------------------------------
    def whole(self) -> dict[str, Any]:
        """The `message` object. Raises `ApiError` (504) when it was given up before its end."""
        (sample,) = self.generation.samples
        assert sample.parser is not None
        message = sample.parser.finish()
        kinds = ("reasoning_content", "content")
        deltas: list[dict[str, Any]] = [{kind: message[kind]} for kind in kinds if message[kind]]
        deltas += [{"tool_calls": [{"index": i, **call}]} for i, call in enumerate(message["tool_calls"])]
        for _ in (*self.blocks.feed(deltas), *self.blocks.close()):
            pass
        return {**self._message(), "content": self.blocks.blocks, **self._stop(), "usage": self._usage()}

    # ---- the streamed reply -------------------------------------------------------------------------------------
    def opening(self) -> Iterator[Event]:
        """The empty message; what came from the cache is not known yet."""
        yield {"type": "message_start", "message": self._message()}
        yield {"type": "ping"}

    def step(self, step: Step) -> Iterator[Event]:
        """What one token adds to the blocks."""
        yield from self.blocks.feed(step.deltas)
        if step.last:
            yield from self.blocks.close()

    def closing(self) -> Iterator[Event]:
        """Why the message ended, and the usage. Raises `ApiError` as `whole` does."""
        yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def failure(self, status: int, message: str) -> Event:
        """An error event."""
        return anthropic_error_body(status, message)

    def encode(self, body: Event) -> str:
        """An event as it is sent."""
        return named_event(body)

    # ---- parts --------------------------------------------------------------------------------------------------
    def _message(self) -> dict[str, Any]:
        return {
            "id": f"msg_{self.generation.id}", "type": "message", "role": "assistant", "model": self.service.model_name,
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage(),
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        """Input tokens are those that the cache did not have, as Anthropic counts them."""
        cached = self.generation.cached_tokens
        return {
            "input_tokens": self.generation.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.generation.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self.generation.reasoning_tokens},
        }

    def _stop(self) -> dict[str, str | None]:
        (sample,) = self.generation.samples
        reason, found = sample.finish_reason, sample.tokens[-1].stop_reason if sample.tokens else None
        if reason == "abort":
            raise ApiError(504, GIVEN_UP)
        if reason == "length":
            return {"stop_reason": "model_context_window_exceeded" if self.cut else "max_tokens", "stop_sequence": None}
        if self.blocks.called:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(found, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": found}
        return {"stop_reason": "end_turn", "stop_sequence": None}
