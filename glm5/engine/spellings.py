"""A grammar whose texts spell no tag in plain characters: `StructuredOutputs.unspelled`.

Who reads the text and not the tokens cannot tell a tag from its spelling: a JSON string could hold `</arg_value>`,
which ends the argument for such a reader, and no expression can be laid over a `%json`. So a token is held back when
its characters complete a spelling, unless the grammar leaves no other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from glm5.engine.grammar_state import GrammarState


class Spellings:
    """Which tokens complete the spelling of a tag, for tokenizers of bytes: in these, ASCII stands as it is."""

    def __init__(self, backend: Backend) -> None:
        added = backend.get_added_tokens_decoder()
        self._plain = {token: text for text, token in backend.get_vocab(with_added_tokens=False).items()
                       if token not in added}  # fmt: skip
        self._added = {token: "" if one.special else one.content for token, one in added.items()}
        """What a reader of the text gets of them."""
        self._tags = {one.content for one in added.values()}
        self._longest = max((len(one.content) for one in added.values()), default=1)
        self._found: dict[tuple[str, bool], list[int]] = {}

    def known(self, tag: str) -> bool:
        """Whether it is the text of an added token."""
        return tag in self._tags

    def after(self, tail: str, token_id: int) -> str:
        """The end of the text, as far as it may matter, after a token."""
        text = self._plain.get(token_id)
        return (tail + (self._added.get(token_id, "") if text is None else text))[-self._longest :]

    def completing(self, tail: str, tags: Sequence[str]) -> list[int]:
        """Tokens behind which the text would hold one of the tags, spelled."""
        found = [self._tokens(tag, begins=False) for tag in tags]
        found += [
            self._tokens(tag[n:], begins=True) for tag in tags for n in range(1, len(tag)) if tail.endswith(tag[:n])
        ]
        return [token for tokens in found for token in tokens]

    def _tokens(self, text: str, *, begins: bool) -> list[int]:
        """Those that begin with a text, or hold it: a few, and found once."""
        key = text, begins
        if key not in self._found:
            last = text[-1]
            among = self._plain if text == last else {t: self._plain[t] for t in self._tokens(last, begins=False)}
            self._found[key] = [t for t, s in among.items() if (s.startswith(text) if begins else text in s)]
        return self._found[key]


class GuardedGrammar:
    """Where one completion stands in a grammar that spells no tag. The same methods as `GrammarState`."""

    def __init__(self, grammar: GrammarState, spellings: Spellings, tags: Sequence[str]) -> None:
        self._grammar, self._spellings, self._tags = grammar, spellings, tags
        self._tail = ""
        self._before: list[str] = []
        """The tail before each token."""

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._grammar.complete

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, bool [V]; at least one. Raises InputError beyond the limits of a step."""
        allowed_V = self._grammar.allowed()
        held = self._spellings.completing(self._tail, self._tags)
        if not held:
            return allowed_V
        unspelled_V = allowed_V.copy()
        unspelled_V[held] = False
        return unspelled_V if unspelled_V.any() else allowed_V

    def accept(self, token_id: int) -> None:
        """Goes on by a token. Raises InputError for one that the grammar does not allow."""
        self._grammar.accept(token_id)  # where it raises nothing is changed here
        self._before.append(self._tail)
        self._tail = self._spellings.after(self._tail, token_id)

    def rollback(self, count: int) -> None:
        """Goes back by `count` tokens."""
        for _ in range(count):
            self._tail = self._before.pop()
        self._grammar.rollback(count)
