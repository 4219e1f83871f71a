"""The body of `POST /v1/responses`, and its input items as the messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from glm5.errors import InputError
from glm5.serve.fields import UNREAD, RequestBody, StreamOptions
from glm5.serve.response_items import opened
from glm5.serve.responses_tools import ResponseTool, shown_name
from glm5.serve.schema import ChatTemplateKwargs
from glm5.serve.tool_choice import ToolChoice, tool_choice

TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
ROLES = {"developer": "system"}
Includable = Literal[
    "reasoning.encrypted_content", "message.output_text.logprobs",
    # of tools and inputs that this server does not have
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
]  # fmt: skip


class Reasoning(BaseModel):
    """`reasoning`. Summaries are not made: the reasoning itself is given."""

    model_config = ConfigDict(extra="ignore")
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TextSettings(BaseModel):
    """`text`."""

    model_config = ConfigDict(extra="ignore")
    format: dict[str, Any] | None = None


class ResponsesRequest(RequestBody):
    """The body."""

    unread: ClassVar[frozenset[str]] = (UNREAD - {"metadata", "store"}) | {
        "access_programs", "background_options", "client_metadata", "image", "max_tool_calls",
    }  # fmt: skip
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,), "conversation": (), "prompt": (), "truncation": ("disabled",), "moderation": (),
        "context_management": ([],),
    }  # fmt: skip

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[ResponseTool] = Field(default_factory=list)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = None
    text: TextSettings = Field(default_factory=TextSettings)
    reasoning: Reasoning = Field(default_factory=Reasoning)
    include: list[Includable] = Field(default_factory=list)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    previous_response_id: str | None = None
    store: bool = True
    metadata: dict[str, Any] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str | None = Field(default=None, min_length=1)
    chat_template_kwargs: ChatTemplateKwargs = Field(default_factory=ChatTemplateKwargs)

    @property
    def enable_thinking(self) -> bool:
        """Whether the model thinks before it answers."""
        return self.chat_template_kwargs.enable_thinking and self.reasoning.effort != "none"

    @property
    def logprobs(self) -> bool:
        """Whether the message comes with log-probabilities."""
        return "message.output_text.logprobs" in self.include or bool(self.top_logprobs)

    @field_validator("tool_choice")
    @classmethod
    def _choice_is_readable(cls, given: Any) -> Any:
        tool_choice(given)
        return given

    @property
    def choice(self) -> ToolChoice:
        """`tool_choice`, read."""
        return tool_choice(self.tool_choice)


def input_messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Input items as chat messages: what one assistant turn was cut into becomes one message again.

    Raises `InputError` for items that this server does not know.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        where = f"input item {number}"
        kind = item.get("type", "message")
        if kind == "message":
            role, text = item.get("role"), _text(item.get("content"), where)
            if role == "assistant":
                turn = _open_turn(messages, fresh="content")
                turn["content"] = text
            else:
                messages.append({"role": ROLES.get(str(role), role), "content": text})
        elif kind == "reasoning":
            if text := _text(item.get("content") or item.get("summary") or [], where) or opened(item):
                _open_turn(messages, fresh="reasoning_content")["reasoning_content"] = text
        elif kind in ("function_call", "custom_tool_call"):
            arguments = item.get("arguments") if kind == "function_call" else {"input": item.get("input")}
            function = {"name": shown_name(item.get("name", ""), item.get("namespace")), "arguments": arguments}
            turn = _open_turn(messages, fresh=None)
            turn.setdefault("tool_calls", []).append(
                {"id": item.get("call_id"), "type": "function", "function": function}
            )
        elif kind in ("function_call_output", "custom_tool_call_output"):
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"), where)}
            )
        else:
            raise InputError(
                f"{where} is of type {kind!r}; this server reads message, reasoning, function_call, custom_tool_call "
                "and their outputs."
            )
    return messages


def _open_turn(messages: list[dict[str, Any]], fresh: str | None) -> dict[str, Any]:
    """The assistant message that the next part belongs to. A part that it already has, or text behind calls, begins
    another one."""
    last = messages[-1] if messages else {}
    parts = {"content": ("content", "tool_calls"), "reasoning_content": ("reasoning_content", "content", "tool_calls")}
    if last.get("role") != "assistant" or any(last.get(part) is not None for part in parts.get(fresh or "", ())):
        last = {"role": "assistant", "content": None}
        messages.append(last)
    return last


def _text(content: Any, where: str) -> str:
    """A text, or the text of a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Iterable) or isinstance(content, Mapping):
        raise InputError(f"The text of {where} is a {type(content).__name__}; give a string or a list of text parts.")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXT_PARTS:
            raise InputError(f"{where} has a part of type {kind!r}; GLM-5 reads text only.")
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise InputError(f"{where} has a part of type {kind!r} without its text; give a string.")
        pieces.append(text)
    return "".join(pieces)
