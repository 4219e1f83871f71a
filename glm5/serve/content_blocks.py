"""From the parser's deltas to Anthropic's content blocks: whole, and as the events of a stream.

Both forms come from the same events: the whole message is what a client would put together from them.

The signature of a thinking block is the SHA-256 of its text in base64. Anthropic's own proves that the block was not
changed; ours only fills the field that clients expect, and is not checked when it comes back.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from glm5.errors import InputError
from glm5.serve.generation import Delta

Event = dict[str, Any]


class ContentBlocks:
    """The blocks of one answer. `feed` gives the events of each delta, `close` those of the end."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        """Finished as soon as the next one begins, or after `close`."""
        self._open = ""  # kind of the last block while it may grow
        self._call = -1  # the tool call that it is
        self._pieces: list[str] = []

    @property
    def called(self) -> bool:
        """Whether there is a tool call."""
        return any(block["type"] == "tool_use" for block in self.blocks)

    def feed(self, deltas: Iterable[Delta]) -> Iterator[Event]:
        """Events for deltas in OpenAI's shape."""
        for delta in deltas:
            if delta.get("reasoning_content"):
                yield from self._text("thinking", delta["reasoning_content"])
            if delta.get("content"):
                yield from self._text("text", delta["content"])
            for call in delta.get("tool_calls", ()):
                yield from self._tool(call)

    def close(self) -> Iterator[Event]:
        """Ends the open block."""
        if not self._open:
            return
        block, text = self.blocks[-1], "".join(self._pieces)
        if self._open == "tool_use":
            block["input"] = _read(text or "{}")
        else:
            block[self._open] = text
        if self._open == "thinking":
            block["signature"] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        self._open, self._pieces = "", []
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        if self._open != kind:
            yield from self.close()
            empty = {"type": kind, kind: ""}
            yield from self._begin({**empty, "signature": ""} if kind == "thinking" else empty)
        self._pieces.append(text)
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _tool(self, call: dict[str, Any]) -> Iterator[Event]:
        if self._open != "tool_use" or call["index"] != self._call:
            yield from self.close()
            self._call = call["index"]
            identity = call["id"].removeprefix("call_")
            yield from self._begin(
                {"type": "tool_use", "id": f"toolu_{identity}", "name": call["function"]["name"], "input": {}}
            )
        if fragment := call["function"].get("arguments"):
            self._pieces.append(fragment)
            yield self._delta({"type": "input_json_delta", "partial_json": fragment})

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        self.blocks.append(block)
        self._open = block["type"]
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


def _read(arguments: str) -> Any:
    """Raises `InputError` for numbers that Python does not read, or reads as infinity, which is no JSON."""
    try:
        return json.loads(arguments, parse_float=_finite)
    except ValueError:
        raise InputError(
            "The call holds a number that is too large or has thousands of digits; ask again, or give it a maximum."
        ) from None


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits} is too large")
    return value
