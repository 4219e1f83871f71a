"""The output items of a response, and the events that build them, from a parser's deltas.

A turn becomes items in the order in which it was written: a reasoning, a message, function calls. Every event carries
what the `openai` package expects by its name; the whole reply holds the same items that the events add up to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]
_KINDS = {"reasoning_content": ("reasoning", "rs"), "content": ("message", "msg")}
_TEXTS = {
    "reasoning": ("reasoning_text", "response.reasoning_text"),
    "message": ("output_text", "response.output_text"),
}


class ResponseItems:
    """Takes deltas, gives events and keeps the items. `seed` makes their identities."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.items: list[dict[str, Any]] = []
        self._open = False
        self._call: int | None = None

    def take(self, delta: dict[str, Any]) -> Iterator[Event]:
        """The events of one delta in the shape of chat completions."""
        for name, (kind, prefix) in _KINDS.items():
            if delta.get(name):
                yield from self._text(kind, prefix, delta[name])
        for call in delta.get("tool_calls", ()):
            yield from self._function(call)

    def finish(self, *, whole: bool) -> Iterator[Event]:
        """The end of the last item; `whole` unless the turn was cut."""
        yield from self._close("completed" if whole else "incomplete")

    def _text(self, kind: str, prefix: str, text: str) -> Iterator[Event]:
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
        self.items[-1]["content"][0]["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"{event}.delta", content_index=0, delta=text, **extra)

    def _function(self, call: dict[str, Any]) -> Iterator[Event]:
        function = call["function"]
        if call["index"] != self._call or not self._open:
            yield from self._close()
            self._call = call["index"]
            item = {"id": f"fc_{self.seed}_{len(self.items)}", "type": "function_call", "status": "in_progress"}
            yield from self._add({**item, "call_id": call["id"], "name": function["name"], "arguments": ""})
        if arguments := function.get("arguments"):
            self.items[-1]["arguments"] += arguments
            yield self._event("response.function_call_arguments.delta", delta=arguments)

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        self.items.append(item)
        self._open = True
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if not self._open:
            return
        item = self.items[-1]
        if item["type"] == "function_call":
            yield self._event("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            text, (_, event) = item["content"][0]["text"], _TEXTS[item["type"]]
            extra: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            yield self._event(f"{event}.done", content_index=0, text=text, **extra)
            yield self._event("response.content_part.done", content_index=0, part=dict(item["content"][0]))
        item["status"] = status
        self._open = False
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text, **({"annotations": [], "logprobs": []} if kind == "output_text" else {})}
