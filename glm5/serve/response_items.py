"""The output items of a response, and the events that build them, from a parser's deltas.

A turn becomes items in the order in which it was written: a reasoning, a message, function calls. Every event carries
what the `openai` package expects by its name; the whole reply holds the same items that the events add up to.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm5.errors import InputError
from glm5.serve.responses_tools import Origin

Event = dict[str, Any]
_KINDS = {"reasoning_content": ("reasoning", "rs"), "content": ("message", "msg")}
_TEXTS = {
    "reasoning": ("reasoning_text", "response.reasoning_text"),
    "message": ("output_text", "response.output_text"),
}


SEALED = "glm5:"


class ResponseItems:
    """Takes deltas, gives events and keeps the items."""

    def __init__(self, seed: str, origins: Mapping[str, Origin] = {}, *, sealed: bool = False) -> None:
        """`seed` makes the identities. `origins`: whose the tools are. `sealed`: a reasoning also comes as the
        `encrypted_content` that clients send back who keep nothing at the server (encoded, not encrypted)."""
        self.seed, self.origins, self.sealed = seed, origins, sealed
        self.items: list[dict[str, Any]] = []
        self._open = False
        self._call: int | None = None
        self._written: list[str] = []  # the open item's text or arguments; they stand in it when it is closed

    def take(self, delta: dict[str, Any], logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """The events of one delta in the shape of chat completions. `logprobs`: of the tokens of its content."""
        for name, (kind, prefix) in _KINDS.items():
            if delta.get(name):
                yield from self._text(kind, prefix, delta[name], logprobs)
        for call in delta.get("tool_calls", ()):
            yield from self._function(call)

    def finish(self, *, whole: bool) -> Iterator[Event]:
        """The end of the last item; `whole` unless the turn was cut."""
        yield from self._close("completed" if whole else "incomplete")

    def _text(self, kind: str, prefix: str, text: str, logprobs: Sequence[dict[str, Any]]) -> Iterator[Event]:
        part, event = _TEXTS[kind]
        if not self._open or self.items[-1]["type"] != kind:
            yield from self._close()
            item: dict[str, Any] = {
                "id": f"{prefix}_{self.seed}_{len(self.items)}",
                "type": kind,
                "status": "in_progress",
            }
            item |= {"summary": [], "content": []} if kind == "reasoning" else {"role": "assistant", "content": []}
            yield from self._add(item)
            empty = _part(part, "")
            self.items[-1]["content"].append(empty)
            yield self._event("response.content_part.added", content_index=0, part=dict(empty))
        self._written.append(text)
        extra: dict[str, Any] = {"logprobs": list(logprobs)} if kind == "message" else {}
        if kind == "message":
            self.items[-1]["content"][0]["logprobs"] += logprobs
        yield self._event(f"{event}.delta", content_index=0, delta=text, **extra)

    def _function(self, call: dict[str, Any]) -> Iterator[Event]:
        function = call["function"]
        if call["index"] != self._call or not self._open:
            yield from self._close()
            self._call = call["index"]
            yield from self._add(self._call_item(call["id"], function["name"]))
        if arguments := function.get("arguments"):
            self._written.append(arguments)
            if self.items[-1]["type"] == "function_call":  # the text of a custom call is known when they are whole
                yield self._event("response.function_call_arguments.delta", delta=arguments)

    def _call_item(self, call_id: str, name: str) -> dict[str, Any]:
        origin = self.origins.get(name, Origin("function", name))
        custom = origin.kind == "custom"
        item = {
            "id": f"{'ctc' if custom else 'fc'}_{self.seed}_{len(self.items)}", "status": "in_progress",
            "type": "custom_tool_call" if custom else "function_call", "call_id": call_id, "name": origin.name,
            "input" if custom else "arguments": "",
        }  # fmt: skip
        return item if origin.namespace is None else {**item, "namespace": origin.namespace}

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        self.items.append(item)
        self._open, self._written = True, []
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if not self._open:
            return
        item, written = self.items[-1], "".join(self._written)
        if item["type"] == "custom_tool_call":
            item["input"] = _input(written)
            yield self._event("response.custom_tool_call_input.delta", delta=item["input"])
            yield self._event("response.custom_tool_call_input.done", input=item["input"])
        elif item["type"] == "function_call":
            item["arguments"] = written
            yield self._event("response.function_call_arguments.done", name=item["name"], arguments=written)
        else:
            item["content"][0]["text"], (_, event) = written, _TEXTS[item["type"]]
            extra: dict[str, Any] = {}
            if item["type"] == "message":
                extra["logprobs"] = item["content"][0]["logprobs"]
            elif self.sealed:
                item["encrypted_content"] = SEALED + base64.b64encode(written.encode()).decode()
            yield self._event(f"{event}.done", content_index=0, text=written, **extra)
            yield self._event("response.content_part.done", content_index=0, part=dict(item["content"][0]))
        item["status"] = status
        self._open = False
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def opened(item: Mapping[str, Any]) -> str:
    """The reasoning in the `encrypted_content` of an item; "" where it is none of ours."""
    content = item.get("encrypted_content")
    if not isinstance(content, str) or not content.startswith(SEALED):
        return ""
    try:
        return base64.b64decode(content.removeprefix(SEALED), validate=True).decode()
    except ValueError:
        raise InputError("The encrypted_content of a reasoning item was changed; send it as it came.") from None


def _input(arguments: str) -> str:
    """The text for a custom tool, from the arguments of the function that stood for it."""
    given = json.loads(arguments or "{}").get("input", "")
    return given if isinstance(given, str) else json.dumps(given)


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text, **({"annotations": [], "logprobs": []} if kind == "output_text" else {})}
