"""What a parser has found since it was last asked, in OpenAI's shape of streamed pieces.

Pieces of one kind that follow each other are one delta, so what is reported does not depend on how the text was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Delta = dict[str, Any]


class Deltas:
    """Collects deltas: `reasoning_content` and `content`, and calls with their arguments."""

    def __init__(self) -> None:
        self._found: list[Delta] = []

    def text(self, kind: str, text: str) -> None:
        """More of `reasoning_content` or `content`."""
        if self._found and kind in self._found[-1]:
            self._found[-1][kind] += text
        else:
            self._found.append({kind: text})

    def call(self, index: int, call: Mapping[str, Any]) -> None:
        """A new call: its identity and name, and no arguments yet."""
        self._found.append({"tool_calls": [{"index": index, **call, "function": {**call["function"]}}]})

    def arguments(self, index: int, fragment: str) -> None:
        """More of the arguments of call `index`, as JSON text."""
        if not fragment:
            return
        if self._found and self._found[-1].get("tool_calls", [{}])[0].get("index") == index:
            self._found[-1]["tool_calls"][0]["function"]["arguments"] += fragment
        else:
            self._found.append({"tool_calls": [{"index": index, "function": {"arguments": fragment}}]})

    def take(self) -> list[Delta]:
        """All since the last time."""
        found, self._found = self._found, []
        return found
