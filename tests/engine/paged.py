"""What the tests of the paged cache share: sequences whose blocks lie in an order of their own."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from glm5.engine.runner import Chunk, Runner


@dataclass
class Tokens:
    """A sequence as the runner's caller keeps it."""

    ids: list[int]
    block_table: list[int]
    done: int = 0
    logits: list = field(default_factory=list)

    def next(self, tokens: int, keep: int | None = None) -> Chunk:
        """Its next tokens; `feed` counts them."""
        ids = self.ids[self.done : self.done + tokens]
        return Chunk(ids, self.done, self.block_table, len(ids) if keep is None else keep)


def scattered(ids: list[list[int]], *, num_blocks: int, block_size: int, seed: int = 0) -> list[Tokens]:
    """Sequences whose blocks are shuffled over the whole cache."""
    free = list(range(num_blocks))
    random.Random(seed).shuffle(free)
    return [Tokens(row, [free.pop() for _ in range(-(-len(row) // block_size))]) for row in ids]


def feed(runner: Runner, sequences: list[Tokens], tokens: int) -> None:
    """One step of `tokens` each; the logits of every token are kept."""
    live = [s for s in sequences if s.done < len(s.ids)]
    for sequence, output in zip(live, runner.run([s.next(tokens) for s in live]), strict=True):
        sequence.logits.append(output.logits_KV)
        sequence.done += len(output.logits_KV)
