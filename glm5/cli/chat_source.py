"""Where the answers of `glm5 chat` come from: an engine in this process, or a running server of OpenAI's API."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from glm5.engine import Engine, SamplingDefaults, SamplingParams
from glm5.errors import InputError
from glm5.text import AssistantStream

Message = dict[str, Any]
TIMEOUT_S = 600
"""How long a server may be silent: a long prompt is read before the first token comes."""


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How answers are sampled; None leaves a setting to the model or the server."""

    thinking: bool = True
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What comes next: a delta in OpenAI's shape, and at the end how many tokens the answer has."""

    delta: dict[str, Any] = field(default_factory=dict)
    completion_tokens: int | None = None


class Source(Protocol):
    """Something that answers. Closing the generator stops the answer."""

    name: str

    def stream(self, messages: list[Message], settings: ChatSettings) -> Generator[Piece, None, None]: ...


class EngineSource:
    """Answers of an engine in this process. Raises `InputError` when it has no tokenizer."""

    def __init__(self, engine: Engine, name: str, defaults: SamplingDefaults = SamplingDefaults()) -> None:
        """`defaults`: what is taken where the settings say nothing; beside them temperature 1 and top_p 0.95."""
        if engine.tokenizer is None:
            raise InputError("A conversation needs a tokenizer; give a model directory that holds tokenizer.json.")
        self.engine, self.tokenizer, self.name = engine, engine.tokenizer, name
        self.defaults = SamplingDefaults(**{"temperature": 1.0, "top_p": 0.95, **defaults.under()})

    def stream(self, messages: list[Message], settings: ChatSettings) -> Generator[Piece, None, None]:
        """Yields the deltas of one answer; raises `GLM5Error` for what does not fit."""
        prompt = self.tokenizer.apply_chat_template(messages, enable_thinking=settings.thinking, escape_special=True)
        params = SamplingParams(
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            **self.defaults.under(temperature=settings.temperature, top_p=settings.top_p),
        )
        parser = AssistantStream(thinking=settings.thinking, seed=f"message {len(messages)}")
        count = 0
        tokens = self.engine.stream(prompt, params)
        try:
            for token in tokens:
                count += 1
                yield from map(Piece, parser.feed(token.text))
            yield from map(Piece, parser.close())
            yield Piece(completion_tokens=count)
        finally:
            tokens.close()


class _Function(BaseModel):
    name: str | None = None
    arguments: str | None = None


class _Call(BaseModel):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Delta(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(BaseModel):
    delta: _Delta | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Chunk(BaseModel):
    """One event of a streamed reply, in so far as it is shown."""

    error: Any = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None


class ServerSource:
    """Answers of a server that speaks OpenAI's `/v1/chat/completions`: ours, vLLM, SGLang and others."""

    def __init__(self, url: str, *, name: str | None = None, key: str | None = None) -> None:
        """`url`: with or without `/v1`. `name`: which of the served models; the first when None. Raises InputError."""
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no address of a server; it begins with http:// or https://.")
        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.key = key
        with self._open("/models") as reply:
            try:
                served = [str(model["id"]) for model in json.load(reply)["data"]]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.base}/models gives no list of models; is this an OpenAI API?") from None
        if not served or (name is not None and name not in served):
            raise InputError(f"{self.base} serves {', '.join(served) or 'no model'}, not {name or 'any'}.")
        self.name = name or served[0]

    def stream(self, messages: list[Message], settings: ChatSettings) -> Generator[Piece, None, None]:
        """Yields the deltas of one answer; raises `InputError` with the server's sentence when it refuses."""
        body: dict[str, Any] = {
            "model": self.name, "messages": messages, "stream": True, "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"enable_thinking": settings.thinking},
        }  # fmt: skip
        for key in ("temperature", "top_p", "max_tokens", "seed"):
            if getattr(settings, key) is not None:
                body[key] = getattr(settings, key)
        with self._open("/chat/completions", body) as reply:
            for data in self._events(reply):
                if data == b"[DONE]":
                    return
                yield from self._pieces(data)
        raise InputError(f"{self.base} ended the connection before the answer was complete; ask again.")

    def _events(self, reply: Iterable[bytes]) -> Iterator[bytes]:
        """The data of each event, up to where the connection ends or breaks."""
        try:
            for line in reply:
                if line.startswith(b"data:"):
                    yield line.removeprefix(b"data:").strip()
        except TimeoutError:
            raise InputError(f"{self.base} was silent for {TIMEOUT_S} seconds; ask again.") from None
        except (OSError, HTTPException):
            return

    def _pieces(self, data: bytes) -> Iterator[Piece]:
        """The pieces in one event of a streamed reply. Raises `InputError` for an error, and for what is no chunk."""
        try:
            chunk = _Chunk.model_validate_json(data)
        except ValidationError:
            said = data[:80].decode(errors="replace")
            raise InputError(f"{self.base} sent what is no event of a chat ({said}); is this an OpenAI API?") from None
        if chunk.error is not None:
            said = chunk.error.get("message", chunk.error) if isinstance(chunk.error, dict) else chunk.error
            raise InputError(f"The server failed: {said}")
        for choice in chunk.choices or []:
            yield Piece(choice.delta.model_dump(exclude_none=True) if choice.delta else {})
        if chunk.usage:
            yield Piece(completion_tokens=chunk.usage.completion_tokens)

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers)
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise InputError(f"{self.base} refused: {_sentence(error)}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"{self.base} cannot be reached ({reason}); check the address.") from None


def _sentence(error: urllib.error.HTTPError) -> str:
    """What an error reply says, or its status."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
