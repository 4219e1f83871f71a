"""The turns of an episode while it is played, each kept as what it adds to the one before.

A prompt repeats all that was said, so whole turns of an agent with hundreds of them take memory by the square of their
number: 0.2 GB for 500 turns of 200 tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from glm5.rl.codec import shared_tokens
from glm5.rl.records import Turn


class KeptTurns:
    """Turns in the order in which they ended."""

    def __init__(self, turns: Iterable[tuple[int, Turn]] = ()) -> None:
        """turns: as they are kept."""
        self._turns = list(turns)
        """The leading tokens of each prompt that the turn before begins with, and the turn with the rest of them."""

    def __len__(self) -> int:
        return len(self._turns)

    def add(self, turn: Turn) -> None:
        """The next one."""
        before = last_tokens((shared, kept.prompt_ids + kept.output_ids) for shared, kept in reversed(self._turns))
        shared = shared_tokens(before, turn.prompt_ids)
        self._turns.append((shared, replace(turn, prompt_ids=turn.prompt_ids[shared:])))

    def __iter__(self) -> Iterator[Turn]:
        """Each as it was, made when it is asked for."""
        before: tuple[int, ...] = ()
        for shared, kept in self._turns:
            turn = replace(kept, prompt_ids=before[:shared] + kept.prompt_ids)
            before = turn.prompt_ids + turn.output_ids
            yield turn


def last_tokens(backwards: Iterable[tuple[int, tuple[int, ...]]]) -> tuple[int, ...]:
    """Prompt and output of the last of some turns.

    backwards: of each turn, the last one first, how many tokens it begins with that the one before it, prompt and
    output, begins with too, and the rest.
    """
    found, end = [], sys.maxsize
    for shared, rest in backwards:
        if end > shared:
            found.append(rest[: end - shared])
            end = shared
        if not end:
            break
    return tuple(chain.from_iterable(reversed(found)))
