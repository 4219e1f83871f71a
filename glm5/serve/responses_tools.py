"""The tools of `/v1/responses`, as the chat template shows them, and whose they are when they are called.

* `function` is shown as it is, and the tools of a `namespace` as NAMESPACE.NAME.
* `custom` takes a text: to the model it is a function with one string, `input`. Its `format` is shown, not enforced.
* `web_search` and `image_generation` are run by OpenAI's service, and offered to the model, never forced on it. Clients
  such as Codex send them unasked, so they are left out of the prompt, and the reply names them (`ignored_tools`).
* All other kinds are refused: a client that sends them counts on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

IGNORED = ("web_search", "image_generation")
INPUT = {
    "type": "object", "properties": {"input": {"type": "string", "description": "The whole input, as plain text."}},
    "required": ["input"], "additionalProperties": False,
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The tool that a name in the prompt stands for."""

    kind: str
    name: str
    namespace: str | None = None


class ResponseTool(BaseModel):
    """A tool of any kind: OpenAI's flat form."""

    model_config = ConfigDict(extra="allow")
    type: str
    name: str | None = Field(default=None, min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None
    tools: list[ResponseTool] | None = None

    @model_validator(mode="after")
    def _is_readable(self) -> ResponseTool:
        if self.ignored:
            return self
        if self.type not in ("function", "custom", "namespace"):
            raise ValueError(
                f"a tool of type {self.type!r} is not run by this server; leave it out, or send a function and run it "
                "yourself"
            )
        if self.name is None:
            raise ValueError(f"a tool of type {self.type!r} needs a name")
        if self.type == "namespace" and not all(tool.type in ("function", "custom") for tool in self.tools or [self]):
            raise ValueError(f"the namespace {self.name!r} needs tools of the types function and custom")
        return self

    @property
    def ignored(self) -> bool:
        """Whether it is run by OpenAI's service and not shown."""
        return self.type.startswith(IGNORED)

    def shown(self, namespace: str | None = None) -> Iterator[tuple[dict[str, Any], Origin]]:
        """What the prompt shows for it, in the envelope of chat completions, and whose it is."""
        if self.ignored:
            return
        name = str(self.name)
        if self.type == "namespace":
            for tool in self.tools or ():
                yield from tool.shown(name)
            return
        function = self.model_dump(exclude={"type", "format", "tools", "allowed_callers"}, exclude_none=True)
        if self.type == "custom":
            function = {"description": self._description(), "parameters": INPUT}
        function = {"name": shown_name(name, namespace), **{k: v for k, v in function.items() if k != "name"}}
        yield {"type": "function", "function": function}, Origin(self.type, name, namespace)

    def _description(self) -> str:
        said, form = self.description or "", self.format or {}
        if form.get("type") == "grammar":
            said += f"\n\nThe input follows this {form.get('syntax')} grammar:\n{form.get('definition')}"
        return said.strip()


def shown_name(name: str, namespace: str | None) -> str:
    """The name of a tool in the prompt."""
    return name if namespace is None else f"{namespace}.{name}"


def shown_tools(tools: Iterable[ResponseTool]) -> tuple[list[dict[str, Any]], dict[str, Origin]]:
    """All that the prompt could show, and whose each name is."""
    shown = [pair for tool in tools for pair in tool.shown()]
    return [tool for tool, _ in shown], {tool["function"]["name"]: origin for tool, origin in shown}
