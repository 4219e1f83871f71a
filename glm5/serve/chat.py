"""A chat completion from request to reply: prompt ids in, and the model's tokens out as OpenAI's objects.

Every sample has its own parser (`glm5.text.AssistantStream`), which splits the text into reasoning, content and
tool calls while it comes. The plain reply and the streamed one are built from the same tokens by the same code.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from glm5.engine import Engine, TokenDelta, TokenStream
from glm5.serve.schema import ChatRequest
from glm5.text import AssistantStream, Tokenizer, token_bytes


class ChatCompletion:
    """One running completion. `start` samples; `take` and `finish` feed the tokens to the parsers.

    Raises `GLM5Error` when the request cannot be rendered, does not fit, or asks for what the engine cannot do.
    """

    def __init__(self, request: ChatRequest, engine: Engine, tokenizer: Tokenizer, model: str) -> None:
        self.request = request
        self.engine = engine
        self.tokenizer = tokenizer
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self.params = request.sampling_params()
        kwargs = request.chat_template_kwargs
        tools = request.visible_tools
        # What a client sends is text: a special token inside it must not speak as another role.
        self.prompt_ids = tokenizer.apply_chat_template(
            request.prompt_messages(),
            tools=tools or None,
            enable_thinking=request.enable_thinking,
            clear_thinking=kwargs.clear_thinking,
            reasoning_effort=kwargs.reasoning_effort,
            escape_special=True,
        )
        self.parsers = [
            AssistantStream(tools, request.enable_thinking, seed=f"{self.id}/{index}") for index in range(self.params.n)
        ]
        self.tokens: list[list[TokenDelta]] = [[] for _ in range(self.params.n)]

    def start(self) -> TokenStream:
        """The engine's tokens; the engine refuses at once what does not fit."""
        return self.engine.stream(self.prompt_ids, self.params)

    def take(self, token: TokenDelta) -> list[dict[str, Any]]:
        """Feeds one token to its parser; the deltas for the client."""
        self.tokens[token.index].append(token)
        return self.parsers[token.index].feed(token.text)

    # ---- the plain reply ----------------------------------------------------------------------------------------
    def reply(self) -> dict[str, Any]:
        """The whole `chat.completion` object, after the last token."""
        body = self._envelope("chat.completion")
        body["choices"] = [self._choice(index) for index in range(self.params.n)]
        body["usage"] = self.usage()
        if self.request.return_token_ids:
            body["prompt_token_ids"] = list(self.prompt_ids)
        return body

    def _choice(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[index]
        message = self.parsers[index].finish()
        called = bool(message["tool_calls"])
        if not called:  # OpenAI's clients expect the field to be absent then
            del message["tool_calls"]
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": _finish_reason(tokens, called),
        }
        if self.request.return_token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        return choice

    def usage(self) -> dict[str, Any]:
        """Token counts of the whole request, all samples together."""
        completion = sum(len(tokens) for tokens in self.tokens)
        prompt = len(self.prompt_ids)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    # ---- the streamed reply -------------------------------------------------------------------------------------
    def opening(self) -> Iterator[dict[str, Any]]:
        """The first chunk of every sample: the role."""
        for index in range(self.params.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, token: TokenDelta) -> Iterator[dict[str, Any]]:
        """The chunks that one token gives; its log-probability goes with the first of them."""
        deltas = self.take(token)
        if token.finish_reason is not None:
            deltas = deltas + self.parsers[token.index].close()
        details = self.request.logprobs or self.request.return_token_ids
        for number, delta in enumerate(deltas or ([{}] if details else [])):
            yield self._chunk(token.index, delta, token if number == 0 else None)
        if token.finish_reason is not None:
            called = bool(self.parsers[token.index].finish()["tool_calls"])
            yield self._chunk(token.index, {}, finish_reason=_finish_reason(self.tokens[token.index], called))

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk when the client asked for usage: no choices."""
        return {**self._envelope("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def _chunk(
        self, index: int, delta: dict[str, Any], token: TokenDelta | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        if token is not None:
            choice["logprobs"] = self._logprobs([token])
            if self.request.return_token_ids:
                choice["token_ids"] = [token.token_id]
        return {**self._envelope("chat.completion.chunk"), "choices": [choice]}

    # ---- parts --------------------------------------------------------------------------------------------------
    def _envelope(self, kind: str) -> dict[str, Any]:
        # The fingerprint names the weights, so that a client of a model in training can tell which version answered.
        fingerprint = f"glm5-weights-{self.engine.version}"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": fingerprint}  # fmt: skip

    def _logprobs(self, tokens: list[TokenDelta]) -> dict[str, Any] | None:
        """OpenAI's `logprobs` object, when the request asked for it."""
        if not self.request.logprobs:
            return None
        content = []
        for token in tokens:
            top = [self._token_logprob(token_id, logprob) for token_id, logprob in token.top_logprobs]
            content.append({**self._token_logprob(token.token_id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token_logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelling = token_bytes(self.tokenizer, token_id)
        text = spelling.decode(errors="replace")  # a token may end inside a character
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(spelling)}


def _finish_reason(tokens: list[TokenDelta], called_tools: bool) -> str:
    """OpenAI's word for why a sample ended."""
    reason = tokens[-1].finish_reason or "stop"
    return "tool_calls" if called_tools and reason == "stop" else reason
