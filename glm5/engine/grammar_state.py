"""`GrammarState`: where one completion stands in its grammar (`glm5.engine.grammar`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import llguidance
import numpy as np
import numpy.typing as npt

from glm5.engine.panics import panics_refused
from glm5.errors import InputError

T = TypeVar("T")
_PICTURE = re.compile(r"\s*(\d+ \|.*|\^|<non-verbose/>|)")
"""Lines of llguidance's messages that show the place in the grammar, or say that they do not."""


class GrammarState:
    """Where one completion stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._broken: InputError | None = None
        """A panic after which nothing is known of the matcher."""

    @property
    def complete(self) -> bool:
        """Whether nothing can follow. Of one that is broken the next `allowed` or `accept` says so."""
        with suppress(InputError):
            return self._asked(lambda: self._matcher.is_stopped() and not self._matcher.is_error())
        return False

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, bool [V]; at least one. Raises InputError beyond the limits of a step."""
        bits = np.frombuffer(self._asked(self._matcher.compute_bitmask), dtype=np.uint8)
        self._refuse_errors()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Goes on by a token. Raises InputError for one that is not allowed."""
        if not self._asked(lambda: self._matcher.consume_token(token_id)):
            self._refuse_errors()
            raise InputError(f"Token {token_id} does not fit the structure of this completion.")

    def rollback(self, count: int) -> None:
        """Goes back by `count` tokens. One that cannot is broken."""
        if count:
            with suppress(InputError):
                self._asked(lambda: self._matcher.rollback(count))

    def _asked(self, work: Callable[[], T]) -> T:
        """What the matcher answers. Raises InputError for a panic, then and ever after."""
        if self._broken is not None:
            raise InputError(str(self._broken))
        try:
            with panics_refused("The structured output cannot go on"):
                return work()
        except InputError as error:
            self._broken = error
            raise

    def _refuse_errors(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"The structured output cannot go on: {one_line(self._matcher.get_error())}.")


def one_line(message: str) -> str:
    """llguidance's message without the picture of the place, and short."""
    lines = [line.strip() for line in message.splitlines() if not _PICTURE.fullmatch(line)]
    return " ".join(lines)[:300].rstrip(" .") or "it is not understood"
