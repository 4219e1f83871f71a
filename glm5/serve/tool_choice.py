"""`tool_choice` of chat completions and responses: the same choices, which one API nests and the other writes flat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glm5.errors import InputError
from glm5.serve.structure import Calls

Mode = Literal["none", "auto", "required"]
Tools = Sequence[Mapping[str, Any]]
SENTENCE = (
    'must be "none", "auto", "required", one tool ({"type": "function", ...} with its name), or some '
    '({"type": "allowed_tools", ...} with a mode "auto" or "required" and tools)'
)


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """Whether tools may or must be called, and which."""

    mode: Mode = "auto"
    name: str | None = None
    """The one tool that must be called."""
    allowed: frozenset[str] | None = None
    """The only tools that may be called; None: all."""

    def visible(self, tools: Tools) -> list[Mapping[str, Any]]:
        """The tools (in the envelope of chat completions) that the prompt shows. Raises `InputError`."""
        names = {tool["function"]["name"] for tool in tools}
        wrong = next((name for name in sorted(self.allowed or ()) if name not in names), None)
        if wrong is not None:
            raise InputError(f"tool_choice allows the tool {wrong!r}, which is not among the tools; send it in tools.")
        if self.mode == "none":
            return []
        return [tool for tool in tools if self.allowed is None or tool["function"]["name"] in self.allowed]

    def forced(self, tools: Tools, *, parallel: bool) -> tuple[Tools, Calls]:
        """The tools and how many calls of them must be made. Raises `InputError` when there is no such tool."""
        if self.mode != "required":
            return (), "none"
        chosen = [tool for tool in tools if self.name in (None, tool["function"]["name"])]
        if not chosen:
            absent = self.name is not None
            what = f"the tool {self.name!r}, which is not among the tools" if absent else "a tool, and there are none"
            raise InputError(f"tool_choice forces {what}; send it in tools.")
        return chosen, "many" if parallel and self.name is None else "one"


def tool_choice(given: Any) -> ToolChoice:
    """The choice in either form. Raises `ValueError` with a sentence."""
    if given is None or given in ("none", "auto", "required"):
        return ToolChoice(mode=given or "auto")
    kind = given.get("type") if isinstance(given, Mapping) else None
    inner = given.get(kind, given) if isinstance(given, Mapping) and isinstance(kind, str) else None
    if kind in ("function", "custom") and isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
        return ToolChoice(mode="required", name=inner["name"])
    if kind == "allowed_tools" and isinstance(inner, Mapping) and inner.get("mode") in ("auto", "required"):
        names = [_name(tool) for tool in inner["tools"]] if isinstance(inner.get("tools"), list) else [None]
        if names and None not in names:
            return ToolChoice(mode=inner["mode"], allowed=frozenset(filter(None, names)))
    if isinstance(kind, str) and kind not in ("function", "custom", "allowed_tools"):
        raise ValueError(f"a tool of type {kind!r} is not run by this server, so it cannot be chosen; {SENTENCE}")
    raise ValueError(SENTENCE)


def _name(tool: Any) -> str | None:
    """The name of a tool in a list of allowed ones."""
    if not isinstance(tool, Mapping) or tool.get("type") not in ("function", "custom"):
        return None
    name = (tool[tool["type"]] if isinstance(tool.get(tool["type"]), Mapping) else tool).get("name")
    return name if isinstance(name, str) else None
