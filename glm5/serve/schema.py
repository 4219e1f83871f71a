"""The body of `POST /v1/chat/completions`, checked: what is understood, what is accepted unread, what is refused."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from glm5.engine import SamplingParams
from glm5.errors import did_you_mean

ACCEPTED_UNREAD = frozenset(
    {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user",
     "verbosity"}
)  # fmt: skip
"""Fields of the OpenAI API that carry nothing for this server."""

NOT_BUILT = {
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}
"""Known fields and the values at which they ask for nothing."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Thinking(BaseModel):
    """`thinking`, as z.ai's API spells it."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["enabled", "disabled"]


class ChatTemplateKwargs(BaseModel):
    """`chat_template_kwargs`."""

    model_config = ConfigDict(extra="forbid")
    enable_thinking: bool = True
    clear_thinking: bool | None = None
    reasoning_effort: Literal["low", "high", "max"] | None = None
    """The effort line of GLM-5.2; the OpenAI field of the same name only turns thinking off ("none")."""


class ChatMessage(BaseModel):
    """The shape of a message; what its role allows is checked where the prompt is made (`glm5.text`)."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @field_validator("content")
    @classmethod
    def _parts_are_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else []:
            kind = part.get("type")
            if kind == "text" and not isinstance(part.get("text"), str):
                raise ValueError('a part of type "text" needs a "text" that is a string')
        return content


class Function(BaseModel):
    """What a tool is called and takes."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1)
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool in OpenAI's envelope."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function


class ChatRequest(BaseModel):
    """A chat completion request. `sampling_params` gives the engine's form of it."""

    model_config = ConfigDict(extra="forbid", strict=False)
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = 0
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: ChatTemplateKwargs = Field(default_factory=ChatTemplateKwargs)
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        """Refuses misspelt fields with the nearest real name, and features that are not built."""
        if not isinstance(body, dict):
            raise ValueError("the body must be one JSON object")
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair; send whole characters") from None
        known = cls.model_fields.keys() | NOT_BUILT.keys() | ACCEPTED_UNREAD
        for name, value in body.items():
            if name not in known:
                raise ValueError(f"Unknown field {name!r}.{did_you_mean(name, known)}")
            if name in NOT_BUILT and value not in NOT_BUILT[name]:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return {name: value for name, value in body.items() if name in cls.model_fields and value is not None}

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if isinstance(self.tool_choice, dict) or self.tool_choice == "required":
            raise ValueError('tool_choice: a forced call is not supported by this server; use "auto" or "none"')
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def enable_thinking(self) -> bool:
        """Whether the model thinks before it answers: on, unless any of the three spellings turns it off."""
        disabled = self.thinking is not None and self.thinking.type == "disabled"
        return self.chat_template_kwargs.enable_thinking and not disabled and self.reasoning_effort != "none"

    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages with OpenAI's newer name of the system role put back."""
        messages = [message.model_dump(exclude_unset=True) for message in self.messages]
        return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]

    @property
    def visible_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt shows; none of them with `tool_choice: "none"`."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        return [tool.model_dump(exclude_unset=True) for tool in tools]

    def sampling_params(self) -> SamplingParams:
        """The engine's settings; raises `InputError` for values out of range."""
        return SamplingParams(
            n=self.n or 1,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            seed=None if self.seed is None else self.seed % 2**64,
            logprobs=self.top_logprobs or 0,
        )
