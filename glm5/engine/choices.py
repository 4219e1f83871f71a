"""Which experts the routers chose: from the pass that computed a token to whoever replays it.

A trainer whose rounding differs from the engine's sends some tokens to other experts; replaying the engine's choices
takes that difference away (rollout routing replay, R3: arXiv 2510.11370). A request with
`SamplingParams.experts_from` gets them: each sampled token brings those of the tokens before it that no earlier one
brought. Of every token they are those of the pass from which the token after it was sampled, however often its row is
computed again later (a preemption, new weights); of a prompt, those of the rows that lie in the cache when its first
token is sampled.

A prefix that is found in the cache is not computed again, so what was chosen there is kept beside the cache, slot by
slot (`ChoicePool`). Only requests that ask fill it, therefore only they find each other's blocks (`chain_root`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class ExpertChoices:
    """The chosen experts of consecutive tokens of one sequence. Immutable, and compared by value."""

    start: int
    """Position of the first token."""
    layers: int
    """The model's sparse layers, without MTP modules."""
    per_token: int
    """Experts that each of them chose."""
    item_bytes: int
    """1 where the model has at most 256 experts in a layer, else 2."""
    data: bytes
    """The numbers, token by token and layer by layer, unsigned, in the machine's order."""

    @classmethod
    def of(cls, start: int, experts_TLK: Array) -> ExpertChoices:
        """From uint8 or uint16 [tokens, layers, experts]."""
        _, layers, per_token = experts_TLK.shape
        return cls(start, layers, per_token, experts_TLK.itemsize, experts_TLK.tobytes())

    def __len__(self) -> int:
        """Tokens."""
        return len(self.data) // self._row

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self)

    @property
    def array(self) -> Array:
        """uint8 or uint16 [tokens, layers, experts], to be read only."""
        numbers: Array = np.frombuffer(self.data, dtype=np.uint8 if self.item_bytes == 1 else np.uint16)
        return numbers.reshape(-1, self.layers, self.per_token)

    def part(self, start: int, end: int | None = None) -> ExpertChoices:
        """Those of the positions from `start` to `end`, as far as they are here."""
        first = max(start - self.start, 0)
        last = len(self) if end is None else max(end - self.start, 0)
        return replace(self, start=self.start + first, data=self.data[first * self._row : last * self._row])

    @property
    def _row(self) -> int:
        return self.layers * self.per_token * self.item_bytes


def joined(parts: Iterable[ExpertChoices | None]) -> ExpertChoices | None:
    """The parts as one, each going on where those before it end; of a token that several tell of, the first counts.

    None without parts. Raises ValueError for a gap between them, and for parts of different models.
    """
    known = [part for part in parts if part is not None]
    if len(known) < 2:
        return known[0] if known else None
    first, end = known[0], known[0].end
    data = [first.data]
    for part in known[1:]:
        if part.start > end:
            raise ValueError(f"expert choices end at token {end} and go on at {part.start}")
        if replace(part, start=first.start, data=first.data) != first:
            raise ValueError(f"expert choices of {part.layers} layers follow those of {first.layers}")
        data.append(part.part(end).data)
        end = max(end, part.end)
    return replace(first, data=b"".join(data))


class SequenceChoices:
    """The choices of one sequence that wait for its next sampled token."""

    def __init__(self, start: int) -> None:
        """Those of the tokens before `start` are not wanted."""
        self.told = start
        """Tokens whose choices went out with a sampled token."""
        self._held: ExpertChoices | None = None

    @property
    def end(self) -> int:
        """Tokens whose choices are known."""
        return self.told if self._held is None else max(self._held.end, self.told)

    def add(self, choices: ExpertChoices) -> None:
        """Of the tokens that were just computed; what is known of them already stays as it is."""
        self._held = joined([self._held, choices.part(self.end)])

    def take(self, end: int) -> ExpertChoices | None:
        """What goes out with the token at position `end`: all that waits, of the tokens before it."""
        if self._held is None or end <= self.told:
            return None
        taken, self._held = self._held.part(self.told, end), self._held.part(end)
        self.told = end
        return taken

    def forget(self) -> None:
        """What waits does not count: drafts that were wrong, or rows that are computed again."""
        self._held = None


class ChoicePool:
    """The choices of the tokens in the cache, block by block. The system gives memory as it is written."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._rows_BSLK: Array | None = None

    def record(self, choices: SequenceChoices, table: Sequence[int], start: int, experts_TLK: Array) -> None:
        """Takes what was chosen for a sequence's tokens from `start` on; what it found in the cache comes along."""
        if self._rows_BSLK is None:
            shape = (self.num_blocks, self.block_size, *experts_TLK.shape[1:])
            self._rows_BSLK = np.empty(shape, dtype=experts_TLK.dtype)
        if choices.end < start:
            found = self._slots(table, choices.end, start)
            choices.add(ExpertChoices.of(choices.end, self._rows_BSLK[found]))
        self._rows_BSLK[self._slots(table, start, start + len(experts_TLK))] = experts_TLK
        choices.add(ExpertChoices.of(start, experts_TLK))

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copies whole blocks, (from, to) each, as the cache does."""
        if self._rows_BSLK is not None:
            for old, new in pairs:
                self._rows_BSLK[new] = self._rows_BSLK[old]

    def _slots(self, table: Sequence[int], start: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Block and place in it of each position."""
        positions = np.arange(start, end)
        first = start // self.block_size
        blocks = np.array(table[first : -(-end // self.block_size)], dtype=np.int64)
        return blocks[positions // self.block_size - first], positions % self.block_size
