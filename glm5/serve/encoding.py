"""JSON of large replies, in pieces: the encoder of the standard library lets no other thread run within one call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

PIECE = 256
"""Entries of a long list that are encoded at once."""


def encoded(body: Any) -> bytes:
    """The same bytes as `JSONResponse` makes. For a worker thread; the event loop goes on meanwhile."""
    return "".join(pieces(body)).encode()


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
