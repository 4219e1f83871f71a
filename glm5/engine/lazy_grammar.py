"""A grammar that begins in the middle of free text: `StructuredOutputs.begins_at`.

    free text  <tool_call> ...the grammar... </tool_call>  free text  <tool_call> ...

Before, between and after, every token may come, at no cost. From the token on that begins it (which is the grammar's
first symbol), the grammar decides, until it is complete; the next such token begins it anew.

Who reads the text and not the tokens cannot tell a tag from its spelling. So outside the grammar the token that begins
it is never *spelled*, and inside none of the tags that the grammar names (a JSON string could hold `</arg_value>`). A
token is held back when its characters complete a spelling, unless the grammar leaves no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

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
        self._longest = max((len(one.content) for one in added.values()), default=1)
        self._found: dict[tuple[str, bool], list[int]] = {}

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


class LazyGrammar:
    """Where one completion stands: in free text, or in the grammar. The same methods as `GrammarState`."""

    complete = False
    """Free text may always go on."""

    def __init__(
        self, begins_at: tuple[int, str], fresh: Callable[[], GrammarState], vocab_size: int, spellings: Spellings,
        tags: Sequence[str],
    ) -> None:  # fmt: skip
        """begins_at: the token and its text. fresh: makes the grammar's beginning. tags: those that it names."""
        self._begins_at, self._fresh, self._vocab_size = begins_at, fresh, vocab_size
        self._spellings, self._tags = spellings, [tag for tag in tags if tag != begins_at[1]]
        self._grammar: GrammarState | None = None
        self._tail = ""
        self._before: list[tuple[GrammarState | None, str]] = []
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
        allowed_V = self._grammar.allowed()
        spelled_V = allowed_V.copy()
        spelled_V[self._spellings.completing(self._tail, self._tags)] = False
        return spelled_V if spelled_V.any() else allowed_V

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


def named_tags(grammar: str, backend: Backend) -> list[str]:
    """The added tokens that a Lark grammar names, or holds in a text."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    return [tag for tag in sorted(set(re.findall(r"<[^<>\s]+>", grammar))) if tag in added]
