"""The body of `POST /v1/chat/completions`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from glm5.engine import StructuredOutputs
from glm5.serve.fields import NEUTRAL, UNREAD, SamplingFields
from glm5.serve.structure import Structure, answer_schema
from glm5.serve.tool_choice import ToolChoice, tool_choice
from glm5.text.messages import results_in_order


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
    """The effort line of GLM-5.2, whatever the template; see `Service.prompt` for the OpenAI field of the same name."""


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
    type: str
    function: Function

    @field_validator("type")
    @classmethod
    def _runs_at_the_client(cls, kind: str) -> str:
        if kind != "function":
            raise ValueError(f"a tool of type {kind!r} is not read here; send it as a function")
        return kind


class StructuredFields(BaseModel):
    """`structured_outputs`, vLLM's field; the engine checks that exactly one is given."""

    model_config = ConfigDict(extra="forbid")
    json_: dict[str, Any] | bool | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def outputs(self) -> StructuredOutputs:
        """The engine's form; raises `InputError`."""
        return StructuredOutputs(json=self.json_, regex=self.regex, choice=self.choice, grammar=self.grammar)


class ChatRequest(SamplingFields):
    """A chat completion request."""

    unread: ClassVar[frozenset[str]] = UNREAD | {"verbosity"}
    refused: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL | {
        "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
        "prediction": (), "web_search_options": (), "echo": (False,), "documents": ([],), "chat_template": (),
        "add_special_tokens": (False,),
    }  # fmt: skip

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredFields | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: ChatTemplateKwargs = Field(default_factory=ChatTemplateKwargs)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @field_validator("tool_choice")
    @classmethod
    def _choice_is_readable(cls, given: Any) -> Any:
        tool_choice(given)
        return given

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.structured_outputs is not None:
            if self.response_format is not None or self.choice.mode == "required":
                raise ValueError("structured_outputs stands alone; leave out response_format and a forced tool_choice")
            if self.enable_thinking and self.structured_outputs.grammar is not None:
                raise ValueError(
                    "structured_outputs.grammar begins with the first token; turn thinking off, or use "
                    "json, regex or choice"
                )
        if self.continue_final_message and (self.response_format is not None or self.choice.mode == "required"):
            raise ValueError("continue_final_message cannot begin a call or an answer in a format; leave one out")
        if not self.add_generation_prompt and not self.continue_final_message:
            raise ValueError("add_generation_prompt: false leaves nothing to answer; set continue_final_message too")
        return self

    @property
    def choice(self) -> ToolChoice:
        """`tool_choice`, read."""
        return tool_choice(self.tool_choice)

    def structure(self) -> Structure:
        """What the answer must look like; raises `InputError`."""
        tools = self.visible_tools
        forced, calls = self.choice.forced(tools, parallel=self.parallel_tool_calls)
        answer = answer_schema(self.response_format)
        if calls == "none" and answer is not None and tools:  # an answer in the format, or calls
            return Structure(answer=answer, tools=tools, calls="many" if self.parallel_tool_calls else "one")
        if self.structured_outputs is not None:
            return Structure(whole=self.structured_outputs.outputs())
        return Structure(tools=forced, calls=calls) if calls != "none" else Structure(answer=answer)

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
        """The messages with OpenAI's newer name of the system role put back, and results in the order of their calls.
        Raises `TextError`."""
        messages = [message.model_dump(exclude_unset=True) for message in self.messages]
        named = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        return [dict(message) for message in results_in_order(named)]

    @property
    def visible_tools(self) -> list[Mapping[str, Any]]:
        """The tools that the prompt shows: of those that `tool_choice` allows, all. Raises `InputError`."""
        return self.choice.visible([tool.model_dump(exclude_unset=True) for tool in self.tools or []])
