"""`POST /v1/chat/completions`: prompt ids from messages, and the model's tokens out as OpenAI's objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from glm5.engine import TokenDelta
from glm5.serve.errors import ApiError, error_body
from glm5.serve.event_stream import COMMENT
from glm5.serve.fields import bad_sequences
from glm5.serve.generation import Generation, Sample, Step
from glm5.serve.schema import ChatRequest
from glm5.serve.service import DONE, Service, data_event
from glm5.serve.structure import as_held, reasoning_share
from glm5.serve.unfinished import Unfinished
from glm5.serve.wording import chat_logprobs, envelope, finish_reason, prompt_logprobs, usage
from glm5.text import AssistantStream


def install_chat(app: FastAPI, service: Service) -> None:
    """Adds the endpoint."""

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        limits = service.limits
        if len(body.messages) > limits.max_messages:
            raise ApiError(400, f"At most {limits.max_messages} messages are accepted; send fewer.", param="messages")
        if (body.n or 1) > limits.max_n:
            raise ApiError(400, f"At most {limits.max_n} choices are made of a request; lower n.", param="n")
        session = request.headers.get("x-session-id")
        return await service.answer(
            request, lambda: ChatReply(body, service, session), stream=body.stream, priority=body.priority
        )


class ChatReply:
    """The reply to one request. Raises `GLM5Error` when the messages cannot be rendered."""

    end = DONE
    pause = COMMENT

    def __init__(self, request: ChatRequest, service: Service, session_id: str | None) -> None:
        self.request, self.service = request, service
        tools, messages = request.visible_tools, request.prompt_messages()
        begun = Unfinished.of(messages.pop()) if request.continue_final_message else None
        thinking = request.enable_thinking if begun is None else begun.reasoning is not None
        prompt = service.prompt(
            messages, session_id, tools or None, enable_thinking=thinking, clear_thinking=request.clear_thinking,
            reasoning_effort=request.chat_template_kwargs.reasoning_effort, effort=request.reasoning_effort,
        )  # fmt: skip
        if begun is not None:
            prompt, thinking = prompt + begun.ids(service.tokenizer), False
        inside = begun is not None and bool(begun.content)
        most = request.max_completion_tokens or request.max_tokens
        share = reasoning_share(len(prompt), most, service.source.max_model_len)
        structure = request.structure().outputs(thinking=thinking, reasoning_tokens=share)
        params = request.sampling(
            service.defaults, max_tokens=most, logprobs=request.top_logprobs or 0, structured_outputs=structure,
            bad_sequences=bad_sequences(request.bad_words, service.tokenizer),
        )  # fmt: skip
        params = service.under_tools(params, tools, parallel=request.parallel_tool_calls, thinking=thinking)
        read = as_held(tools, params.structured_outputs)
        self.generation = Generation(
            service.source, [prompt], params,
            parser=lambda seed: AssistantStream(read, thinking, seed, bool(tools), inside),
            session_id=session_id, salt=request.cache_salt, priority=request.priority, messages=messages,
        )  # fmt: skip

    # ---- the plain reply ----------------------------------------------------------------------------------------
    def whole(self) -> dict[str, Any]:
        """The `chat.completion` object."""
        body = self._envelope("chat.completion")
        body["choices"] = [self._choice(sample) for sample in self.generation.samples]
        body["usage"] = usage(self.generation)
        if self.request.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(self.service.tokenizer, self.generation)
        if self.request.return_token_ids:
            body["prompt_token_ids"] = self.generation.prompts[0]
        return body

    def _choice(self, sample: Sample) -> dict[str, Any]:
        assert sample.parser is not None
        message = {**sample.parser.finish(), "refusal": None}
        called = bool(message["tool_calls"])
        if not called:  # OpenAI's clients expect the field to be absent then
            del message["tool_calls"]
        choice: dict[str, Any] = {
            "index": sample.index,
            "message": message,
            "logprobs": self._logprobs(sample.tokens) if self.request.logprobs else None,
            "finish_reason": finish_reason(sample.finish_reason, called),
        }
        if self.request.return_token_ids:
            choice["token_ids"] = [token.token_id for token in sample.tokens]
            choice["weight_versions"] = [token.version for token in sample.tokens]
        return choice

    # ---- the streamed reply -------------------------------------------------------------------------------------
    def opening(self) -> Iterator[dict[str, Any]]:
        """The first chunk of every sample: the role. The prompt's ids come with it."""
        for sample in self.generation.samples:
            chunk = self._chunk(sample, {"role": "assistant", "content": ""})
            if self.request.return_token_ids:
                chunk["prompt_token_ids"] = self.generation.prompts[0]
            yield chunk

    def step(self, step: Step) -> Iterator[dict[str, Any]]:
        """The chunks that one token gives; its log-probability goes with the first of them."""
        details = step.token is not None and (self.request.logprobs or self.request.return_token_ids)
        for number, delta in enumerate(step.deltas or ([{}] if details else [])):
            yield self._chunk(step.sample, delta, step if number == 0 else None)
        if step.last:
            assert step.sample.parser is not None
            called = bool(step.sample.parser.finish()["tool_calls"])
            yield self._chunk(step.sample, {}, finish=finish_reason(step.sample.finish_reason, called))

    def closing(self) -> Iterator[dict[str, Any]]:
        """The last chunk when the client asked for usage: no choices."""
        if self._says_usage:
            yield {**self._envelope("chat.completion.chunk"), "choices": [], "usage": usage(self.generation)}

    def failure(self, status: int, message: str) -> dict[str, Any]:
        """An error event."""
        return error_body(status, message)

    def encode(self, body: dict[str, Any]) -> str:
        """A chunk as it is sent."""
        return data_event(body)

    def _chunk(
        self, sample: Sample, delta: dict[str, Any], step: Step | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": sample.index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if step is not None and step.token is not None:
            if self.request.logprobs:
                choice["logprobs"] = self._logprobs([step.token])
            if self.request.return_token_ids:
                choice["token_ids"] = [step.token.token_id]
                choice["weight_versions"] = [step.token.version]
        said = {"usage": None} if self._says_usage else {}  # in every chunk, as OpenAI does
        return {**self._envelope("chat.completion.chunk"), "choices": [choice], **said}

    @property
    def _says_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    def _logprobs(self, tokens: list[TokenDelta]) -> dict[str, Any]:
        return chat_logprobs(self.service.tokenizer, tokens, as_ids=self.request.return_tokens_as_token_ids)

    def _envelope(self, kind: str) -> dict[str, Any]:
        return envelope(self.generation, kind, "chatcmpl", self.service.model_name)
