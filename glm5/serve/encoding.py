"""JSON of large replies, in pieces: the encoder of the standard library lets no other thread run within one call."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

PIECE = 64
"""Entries of a long list that are encoded at once."""
PART_BYTES = 256 * 1024
"""About how much is sent at once."""


class LargeResponse(StreamingResponse):
    """A JSON body in parts: one of some hundred megabytes is never put together, which would take a second alone.

    Calls `leave` when the last part is taken, or none will be: until then the parts that wait stand in no account of
    what is unsent (`SendAtLeisure`), so the request keeps its place.
    """

    def __init__(self, parts: list[bytes], leave: Callable[[], None]) -> None:
        async def given() -> AsyncIterator[bytes]:
            while waiting:
                yield waiting.popleft()

        waiting, self.leave = deque(parts), leave
        length = str(sum(map(len, parts)))
        super().__init__(given(), media_type="application/json", headers={"Content-Length": length})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the parts."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


def encoded(body: Any) -> list[bytes]:
    """The same bytes as `JSONResponse` makes, in parts. For a worker thread; the event loop goes on meanwhile."""
    parts: list[bytes] = []
    text: list[str] = []
    size = 0
    for piece in pieces(body):
        text.append(piece)
        size += len(piece)
        if size > PART_BYTES:
            parts.append("".join(text).encode())
            text, size = [], 0
    return [*parts, "".join(text).encode()]


def pieces(value: Any) -> Iterator[str]:
    """The text in pieces: of lists so many entries, of objects each field by itself."""
    if isinstance(value, dict) and value:
        for number, (name, inner) in enumerate(value.items()):
            yield f"{',' if number else '{'}{_text(name)}:"
            yield from pieces(inner)
        yield "}"
    elif isinstance(value, list) and len(value) > PIECE:
        for start in range(0, len(value), PIECE):
            yield ("," if start else "[") + _text(value[start : start + PIECE])[1:-1]
        yield "]"
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield "," if number else "["
            yield from pieces(inner)
        yield "]"
    else:
        yield _text(value)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
