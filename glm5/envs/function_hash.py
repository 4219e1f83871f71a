"""A name for what a function does, by which a resumed run knows that it is the same function.

Hashed are the words of its source, without comments and the width of its lines and indents, and the values that are
bound to it beside its source: those of its closure and its defaults. Left out: what it finds in its module.
"""

from __future__ import annotations

import inspect
import io
import textwrap
import token
import tokenize
from collections.abc import Callable
from hashlib import sha256

PLAIN = (bool, int, float, str, bytes, type(None))
"""Kinds of values whose text says all about them."""
SILENT = frozenset({token.COMMENT, token.NL, token.ENCODING, token.ENDMARKER})


def function_hash(function: Callable[..., object]) -> str | None:
    """Eight digits. None where they would not tell: for what is no function of Python, or has no source, or is bound to
    something else, and for a lambda beside another one, whose source is the whole line."""
    if not inspect.isfunction(function):
        return None
    try:
        bound = [cell.cell_contents for cell in function.__closure__ or ()]
        words = _words(inspect.getsource(function))
    except (OSError, ValueError):  # no source; a cell that is still empty
        return None
    bound += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    shared = function.__name__ == "<lambda>" and words.count("lambda") > 1
    if shared or not all(type(value) in PLAIN for value in bound):
        return None
    return sha256(repr((words, bound)).encode()).hexdigest()[:8]


def _words(source: str) -> list[str]:
    """What Python reads of it, with marks where lines and blocks end. A lambda may come with a piece of its line."""
    words: list[str] = []
    try:
        for part in tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline):
            if part.type in (token.INDENT, token.DEDENT, token.NEWLINE):
                words.append(token.tok_name[part.type])
            elif part.type not in SILENT:
                words.append(part.string)
    except tokenize.TokenError:
        pass  # it is at the end, of such a piece
    except SyntaxError:
        return [source]
    return words
