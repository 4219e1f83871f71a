"""The body of `POST /v1/chat/completions`, checked."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from glm5.serve.fields import UNREAD, SamplingFields


class Thinking(BaseModel):
    """`thinking`, as z.ai's API spells it."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["enabled", "disabled"]
    clear_thinking: bool | None = None


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
    strict: bool | None = None


class Tool(BaseModel):
    """A tool in OpenAI's envelope."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function


class ChatRequest(SamplingFields):
    """A chat completion request."""

    unread: ClassVar[frozenset[str]] = UNREAD | {"verbosity"}
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
        "prediction": (), "web_search_options": (),
    }  # fmt: skip

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: ChatTemplateKwargs = Field(default_factory=ChatTemplateKwargs)

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

    @property
    def clear_thinking(self) -> bool | None:
        """Whether earlier turns lose their reasoning; None leaves it to the template."""
        stated = self.chat_template_kwargs.clear_thinking
        return self.thinking.clear_thinking if stated is None and self.thinking is not None else stated

    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages with OpenAI's newer name of the system role put back."""
        messages = [message.model_dump(exclude_unset=True) for message in self.messages]
        return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]

    @property
    def visible_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt shows; none of them with `tool_choice: "none"`."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        return [tool.model_dump(exclude_unset=True) for tool in tools]
