"""A grammar that begins in the middle of free text: `StructuredOutputs.begins_at`.

    free text  <tool_call> ...the grammar... </tool_call>  free text  <tool_call> ...

Before, between and after, every token may come, at no cost. From the token on that begins it (which is the grammar's
first symbol), the grammar decides, until it is complete; the next such token begins it anew. Outside the grammar the
token that begins it is never *spelled* in plain characters, which a reader of the text would take for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from glm5.engine.grammar_state import GrammarState
from glm5.engine.spellings import GuardedGrammar, Spellings

Begun = GrammarState | GuardedGrammar


class LazyGrammar:
    """Where one completion stands: in free text, or in the grammar. The same methods as `GrammarState`."""

    complete = False
    """Free text may always go on."""

    def __init__(
        self, begins_at: tuple[int, str], fresh: Callable[[], Begun], vocab_size: int, spellings: Spellings
    ) -> None:
        """begins_at: the token and its text. fresh: makes the grammar's beginning."""
        self._begins_at, self._fresh, self._vocab_size = begins_at, fresh, vocab_size
        self._spellings = spellings
        self._grammar: Begun | None = None
        self._tail = ""
        self._before: list[tuple[Begun | None, str]] = []
        """Grammar and tail before each token."""

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens may come next, bool [V]; None: all."""
        if self._grammar is None:
            held = self._spellings.completing(self._tail, self._begins_at[1:])
            if not held:
                return None
            allowed_V = np.ones(self._vocab_size, dtype=np.bool_)
            allowed_V[held] = False
            return allowed_V
        return self._grammar.allowed()

    def accept(self, token_id: int) -> None:
        """Goes on by a token. Raises InputError for one that the grammar does not allow."""
        grammar = self._grammar
        if grammar is None and token_id == self._begins_at[0]:
            grammar = self._fresh()
        if grammar is not None:
            grammar.accept(token_id)  # where it raises nothing is changed here
        self._before.append((self._grammar, self._tail))
        self._tail = self._spellings.after(self._tail, token_id)
        self._grammar = None if grammar is not None and grammar.complete else grammar

    def rollback(self, count: int) -> None:
        """Goes back by `count` tokens."""
        for _ in range(count):
            self._grammar, self._tail = self._before.pop()
            if self._grammar is not None:
                self._grammar.rollback(1)
