"""`POST /v1/responses`: OpenAI's newer form of a turn, over the same prompt and parser as chat completions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from glm5.engine import SamplingParams, TokenDelta
from glm5.serve.errors import GIVEN_UP, ApiError
from glm5.serve.event_stream import COMMENT
from glm5.serve.generation import Generation, Step
from glm5.serve.response_items import ResponseItems
from glm5.serve.response_store import ResponseStore
from glm5.serve.responses_schema import ResponsesRequest, input_messages
from glm5.serve.responses_tools import shown_tools
from glm5.serve.service import Service, named_event
from glm5.serve.structure import Structure, answer_schema, as_held, reasoning_share
from glm5.serve.wording import SpokenTokens
from glm5.text import AssistantStream
from glm5.text.messages import results_in_order

ENDS = {"stop": "completed", "length": "incomplete", "abort": "failed"}


def install_responses(app: FastAPI, service: Service) -> None:
    """Adds the endpoint and what reads its store."""
    store = ResponseStore()

    def earlier_messages(body: ResponsesRequest) -> list[dict[str, Any]]:
        """Those that the body goes on from; with its own there are not too many."""
        service.check_model(body.model)
        earlier = store.earlier(body.previous_response_id).messages if body.previous_response_id is not None else []
        most = service.limits.max_messages
        if len(earlier) + (len(body.input) if isinstance(body.input, list) else 1) > most:
            raise ApiError(400, f"At most {most} messages are accepted; send less.")
        return earlier

    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        earlier, session = earlier_messages(body), request.headers.get("x-session-id")
        return await service.answer(
            request,
            lambda: ResponseReply(body, service, store, earlier, session),
            stream=body.stream,
            priority=body.priority,
        )

    @app.post("/v1/responses/input_tokens")
    async def input_tokens(body: ResponsesRequest, request: Request) -> dict[str, Any]:
        earlier, session = earlier_messages(body), request.headers.get("x-session-id")
        reply = await run_in_threadpool(ResponseReply, body, service, store, earlier, session)
        return {"object": "response.input_tokens", "input_tokens": reply.generation.prompt_tokens}

    @app.get("/v1/responses/{name}")
    async def stored(name: str, stream: bool = False) -> dict[str, Any]:
        if stream:
            raise ApiError(400, "A stored response is given whole; leave stream out.", param="stream")
        return store.get(name).body

    @app.delete("/v1/responses/{name}")
    async def forget(name: str) -> dict[str, Any]:
        store.delete(name)
        return {"id": name, "object": "response", "deleted": True}


class ResponseReply:
    """The reply to one request. Raises `GLM5Error` when the input cannot be rendered."""

    end = ""
    pause = COMMENT

    def __init__(
        self, request: ResponsesRequest, service: Service, store: ResponseStore, earlier: list[dict[str, Any]],
        session_id: str | None,
    ) -> None:  # fmt: skip
        self.request, self.service, self.store = request, service, store
        self.messages = [dict(m) for m in results_in_order([*earlier, *input_messages(request.input)])]
        shown, origins = shown_tools(request.tools)
        self.tools, self.thinking = request.choice.visible(shown), request.enable_thinking
        opening = [{"role": "system", "content": request.instructions}] if request.instructions else []
        kwargs = request.chat_template_kwargs
        prompt = service.prompt(
            [*opening, *self.messages], session_id, self.tools or None, enable_thinking=self.thinking,
            clear_thinking=kwargs.clear_thinking, reasoning_effort=kwargs.reasoning_effort,
            effort=request.reasoning.effort,
        )  # fmt: skip
        params = self._params(len(prompt))
        self.read = as_held(self.tools, params.structured_outputs)
        self.generation = Generation(
            service.source, [prompt], params, parser=self._parser, session_id=session_id,
            salt=request.cache_salt, priority=request.priority, messages=[*opening, *self.messages],
        )  # fmt: skip
        self.id = f"resp_{self.generation.id}"
        sealed = "reasoning.encrypted_content" in request.include
        self.items = ResponseItems(self.generation.id, origins, sealed=sealed)
        self.spoken = SpokenTokens(service.tokenizer, calls=bool(self.tools)) if request.logprobs else None
        self.events = 0

    def _parser(self, seed: str) -> AssistantStream:
        return AssistantStream(self.read, self.thinking, seed, bool(self.tools))

    def _params(self, prompt_tokens: int) -> SamplingParams:
        request = self.request
        tools, calls = request.choice.forced(self.tools, parallel=request.parallel_tool_calls)
        answer = answer_schema(request.text.format) if calls == "none" else None
        if answer is not None and self.tools:
            tools, calls = self.tools, "many" if request.parallel_tool_calls else "one"
        share = reasoning_share(prompt_tokens, request.max_output_tokens, self.service.source.max_model_len)
        structure = Structure(answer=answer, tools=tools, calls=calls).outputs(
            thinking=self.thinking, reasoning_tokens=share
        )
        params = SamplingParams(
            max_tokens=request.max_output_tokens,
            stop=request.stop or (),
            seed=request.seed,
            ignore_eos=request.ignore_eos,
            logprobs=request.top_logprobs or 0,
            structured_outputs=structure,
            **self.service.defaults.under(
                temperature=request.temperature, top_p=request.top_p, top_k=request.top_k, min_p=request.min_p
            ),
        )
        return self.service.under_tools(
            params, self.tools, parallel=request.parallel_tool_calls, thinking=self.thinking
        )

    # ---- whole and streamed -------------------------------------------------------------------------------------
    def whole(self) -> dict[str, Any]:
        """The `response` object, from the same items as the events."""
        parser = self._parser(f"{self.generation.id}/0")
        for token in self.generation.samples[0].tokens:
            for _ in self._take(parser.feed(token.text), token, parser):
                pass
        for _ in self._take(parser.close(), None, parser):
            pass
        for _ in self.items.finish(whole=self._status == "completed"):
            pass
        return self._finished()

    def opening(self) -> Iterator[dict[str, Any]]:
        """`response.created` and `response.in_progress`."""
        for kind in ("response.created", "response.in_progress"):
            yield self._numbered({"type": kind, "response": self._body("in_progress")})

    def step(self, step: Step) -> Iterator[dict[str, Any]]:
        """The events of one token."""
        assert step.sample.parser is not None
        yield from map(self._numbered, self._take(step.deltas, step.token, step.sample.parser))

    def closing(self) -> Iterator[dict[str, Any]]:
        """The end of the last item, and the whole response."""
        yield from map(self._numbered, self.items.finish(whole=self._status == "completed"))
        yield self._numbered({"type": f"response.{self._status}", "response": self._finished()})

    def failure(self, status: int, message: str) -> dict[str, Any]:
        """An error event."""
        code = "invalid_request_error" if status < 500 else "server_error"
        return self._numbered({"type": "error", "code": code, "message": message, "param": None})

    def encode(self, body: dict[str, Any]) -> str:
        """An event as it is sent."""
        return named_event(body)

    # ---- parts --------------------------------------------------------------------------------------------------
    def _take(
        self, deltas: list[dict[str, Any]], token: TokenDelta | None, parser: AssistantStream
    ) -> Iterator[dict[str, Any]]:
        """The events of what the parser made of a token; the log-probabilities go with the content."""
        if self.spoken is not None and token is not None:
            self.spoken.take(token, reasoning=parser.reasoning)
        for delta in deltas:
            logprobs = self.spoken.give() if self.spoken is not None and delta.get("content") else ()
            yield from self.items.take(delta, logprobs)

    @property
    def _status(self) -> str:
        return ENDS[self.generation.samples[0].finish_reason]

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        event = {**event, "sequence_number": self.events}
        self.events += 1
        return event

    def _finished(self) -> dict[str, Any]:
        """The object after the last token; it is stored if the request wants that."""
        body = self._body(self._status)
        if self.request.store:
            self.store.put(body, [*self.messages, *input_messages(self.items.items)])
        return body

    def _body(self, status: str) -> dict[str, Any]:
        request, generation = self.request, self.generation
        done = status != "in_progress"
        ignored = [tool.type for tool in request.tools if tool.ignored]
        return {
            "id": self.id,
            "object": "response",
            "created_at": generation.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": {"code": "server_error", "message": GIVEN_UP} if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self.service.model_name,
            "output": list(self.items.items) if done else [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning.effort, "summary": None},
            "store": request.store,
            "temperature": generation.params.temperature,
            "text": {"format": request.text.format or {"type": "text"}},
            "tool_choice": request.tool_choice,
            "tools": [tool.model_dump(exclude_unset=True) for tool in request.tools if not tool.ignored],
            **({"ignored_tools": ignored} if ignored else {}),
            "top_p": generation.params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if done else None,
            "weight_version": generation.version,
        }

    def _usage(self) -> dict[str, Any]:
        generation = self.generation
        return {
            "input_tokens": generation.prompt_tokens,
            "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": generation.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": generation.reasoning_tokens},
            "total_tokens": generation.prompt_tokens + generation.completion_tokens,
        }
