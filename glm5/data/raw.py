"""What a source yields: documents as they lie there, and what could not be read. Huge ones are cut into parts.

A source is a function without arguments that yields `(name, text)` pairs, `Raw` or `Broken`. Text may be an iterator of
pieces, so that a file larger than memory is read piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE = 1 << 20
"""Characters that are read at a time."""


class Raw(NamedTuple):
    """One document before cleaning."""

    name: str
    text: str | Iterable[str]
    """Whole, or in pieces of any size."""
    sha256: str | None = None
    """Of the bytes of the origin; None: of the text in UTF-8."""
    licence: str | None = None
    """Where it differs from the source's."""


class Broken(NamedTuple):
    """Something that could not be read; `sentence` names it and says what to do."""

    name: str
    sentence: str


Reading = Iterator[Raw | Broken | tuple[str, str]]


def cut_text(text: str | Iterable[str], limit: int) -> Iterator[str]:
    """Parts of at most `limit` characters, cut where a paragraph ends, else a line, else a word, else anywhere.

    A border is taken only from the second half of a part, so that parts do not become tiny. Never holds much more than
    one part and one piece.
    """
    pieces = (text[i : i + PIECE] for i in range(0, len(text), PIECE)) if isinstance(text, str) else text
    held = ""
    for piece in pieces:
        held += piece
        while len(held) > limit:
            at = border(held, limit)
            yield held[:at]
            held = held[at:]
    if held:
        yield held


def border(text: str, limit: int) -> int:
    """Where to cut: the end of the last paragraph, line or word within the second half of `limit` characters."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, limit // 2, limit)
        if found >= 0:
            return min(found + len(mark), limit)
    return limit
