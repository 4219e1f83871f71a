"""Stop strings of a rollout: where a turn ends before the model ends it, and what the environment reads of it.

A stop is met by the text of the tokens, however they cut it, so it is looked for here, in the tokens as they come: any
engine will do, and a turn that goes on after a crash begins with the tokens that it has.

The turn is all tokens that were sampled, up to and with the one that completes the stop, also where that token goes on
behind it. They are what is learnt from and what later prompts hold; nothing is cut off or tokenised again. Each was
drawn from the whole distribution, so log-probabilities are as without a stop: it only hands the turn over.
"""

from __future__ import annotations

from collections.abc import Iterable

from glm5.engine.stop_strings import StopStrings
from glm5.text import Detokenizer, Tokenizer


def answer_begins(thinking: bool, tools: bool) -> tuple[str, ...]:
    """The texts from the first of which on stop strings are looked for, as a server does: not in a thought."""
    if not thinking:
        return ()
    return ("</think>", "<tool_call>") if tools else ("</think>",)


class SpokenText:
    """The text of a turn, token by token, up to the first stop string.

    keep: with it, instead of what is before it. begin: see `answer_begins`.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...] = (), *, keep: bool = True, begin: tuple[str, ...] = ()
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
        self._strings = StopStrings(stops, include=keep, begin=begin)
        self._pieces: list[str] = []
        self.stopped = False
        """Whether a stop string was met."""

    def take(self, token_ids: Iterable[int]) -> bool:
        """Takes more tokens, those behind a stop excepted; says whether one was met."""
        for token_id in token_ids:
            if self.stopped:
                break
            piece, met = self._strings.feed(self._detokenizer.feed(token_id))
            self._pieces.append(piece)
            self.stopped = met is not None
        return self.stopped

    def whole(self) -> str:
        """All of it. No more tokens come."""
        if not self.stopped:
            piece, met = self._strings.feed(self._detokenizer.finish())
            self._pieces += [piece, "" if met is not None else self._strings.finish()]
        return "".join(self._pieces)
