"""`GrammarState`: where one completion stands in its grammar (`glm5.engine.grammar`)."""

from __future__ import annotations

import re

import llguidance
import numpy as np
import numpy.typing as npt

from glm5.errors import InputError

_PICTURE = re.compile(r"\s*(\d+ \|.*|\^|<non-verbose/>|)")
"""Lines of llguidance's messages that show the place in the grammar, or say that they do not."""


class GrammarState:
    """Where one completion stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, bool [V]; at least one. Raises InputError beyond the limits of a step."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._refuse_errors()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Goes on by a token. Raises InputError for one that is not allowed."""
        if not self._matcher.consume_token(token_id):
            self._refuse_errors()
            raise InputError(f"Token {token_id} does not fit the structure of this completion.")

    def rollback(self, count: int) -> None:
        """Goes back by `count` tokens."""
        if count and not self._matcher.rollback(count):
            self._refuse_errors()

    def _refuse_errors(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"The structured output cannot go on: {one_line(self._matcher.get_error())}.")


def one_line(message: str) -> str:
    """llguidance's message without the picture of the place, and short."""
    lines = [line.strip() for line in message.splitlines() if not _PICTURE.fullmatch(line)]
    return " ".join(lines)[:300].rstrip(" .") or "it is not understood"
