"""The bodies of `POST /v1/messages` and `POST /v1/messages/count_tokens`, checked.

What Anthropic runs on its own machines (server tools, containers, files) is refused with a sentence, and so are images
and documents: GLM-5 reads text only. Fields about price, cache or priority are accepted unread.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from glm5.serve.fields import RequestBody

Content = str | list[dict[str, Any]]


class Thinking(BaseModel):
    """`thinking`. A budget bounds the reasoning before a forced call or a JSON answer; elsewhere `max_tokens` does."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=1)

    @field_validator("type")
    @classmethod
    def _is_built(cls, kind: str) -> str:
        if kind == "between_tools":
            raise ValueError("'between_tools' is not supported by this server; use enabled, adaptive or disabled")
        return kind


class AnthropicMessage(BaseModel):
    """A message; its blocks are read where the prompt is made (`anthropic_prompt`)."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["user", "assistant", "system"]
    content: Content


class AnthropicTool(BaseModel):
    """A tool of the client's own."""

    model_config = ConfigDict(extra="ignore")
    type: str | None = None
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    defer_loading: bool = False
    """Whether the prompt hides the tool until a result refers to it."""
    strict: bool = False

    @model_validator(mode="after")
    def _runs_at_the_client(self) -> AnthropicTool:
        if self.type not in (None, "custom"):
            raise ValueError(
                f"the tool type {self.type!r} is built into Anthropic's service; give a tool with an input_schema"
            )
        if self.input_schema is None:
            raise ValueError(f"the tool {self.name!r} needs an input_schema")
        return self

    def as_function(self) -> dict[str, Any]:
        """The tool in the envelope that the chat template reads."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema,
                    "defer_loading": self.defer_loading or None, "strict": self.strict or None}  # fmt: skip
        return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


class ToolChoice(BaseModel):
    """`tool_choice`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _names_a_tool(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError('a name belongs to the type "tool", which needs one')
        return self


class OutputFormat(BaseModel):
    """`output_config.format`."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    """`output_config`."""

    model_config = ConfigDict(extra="ignore")
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountTokensRequest(RequestBody):
    """What makes a prompt."""

    unread: ClassVar[frozenset[str]] = frozenset(
        {"billing_policy", "cache_control", "diagnostics", "fallback_credit_token", "inference_geo", "metadata",
         "service_tier", "speed", "user_profile_id", "workspace_id"}
    )  # fmt: skip
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "compaction": (), "container": (), "fallbacks": ([],), "mcp_servers": ([],),
        "context_management": ({}, {"edits": []}, {
            "edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    }  # fmt: skip
    """Earlier thinking is always kept as it was sent, which is what the one accepted edit asks for."""

    model: str
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: Content | None = None
    tools: list[AnthropicTool] = Field(default_factory=list)
    tool_choice: ToolChoice = Field(default_factory=lambda: ToolChoice(type="auto"))
    thinking: Thinking = Field(default_factory=lambda: Thinking(type="disabled"))
    output_config: OutputConfig = Field(default_factory=OutputConfig)
    thread: dict[str, Any] | None = None
    """A conversation that the server holds: refused, in the way after which the package sends the whole of it."""

    @model_validator(mode="after")
    def _choice_has_tools(self) -> CountTokensRequest:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two of them have one name; give each its own")
        choice = self.tool_choice
        if choice.type == "any" and not names:
            raise ValueError('tool_choice: the type "any" needs tools')
        if choice.name is not None and choice.name not in names:
            raise ValueError(f"tool_choice: there is no tool {choice.name!r}; name one of the tools")
        return self

    @property
    def enable_thinking(self) -> bool:
        """Off unless asked for, as in Anthropic's API."""
        return self.thinking.type != "disabled"

    @property
    def visible_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt shows; none of them when none may be called."""
        return [] if self.tool_choice.type == "none" else [tool.as_function() for tool in self.tools]


class MessagesRequest(CountTokensRequest):
    """A request for an answer."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[str] = Field(default_factory=list)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
