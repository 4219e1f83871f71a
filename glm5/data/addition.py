"""Sums with worked reasoning: column by column from the right, the carry written out.

    47 + 38:  ones 7+8+0=15
              tens 4+3+1=08

Each line adds two digits and the carry of the line before (the first digit of its sum); the answer is the second digits
read upwards, with the last carry in front. Every step needs a few tokens near each other, so a tiny model learns the
steps and not the sums. Split by number, not by problem: some whole numbers are held out, and no training problem adds
one of them. The wordings are those of `glm5.data.arithmetic`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glm5.data.arithmetic import PHRASINGS
from glm5.data.corpus import Split, is_held_out

COLUMNS = ("ones", "tens", "hundreds", "thousands")
HELD_OUT_PER_THOUSAND = 100


@dataclass(frozen=True)
class Sum:
    """a + b in one wording."""

    a: int
    b: int
    question: str

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    def messages(self) -> tuple[dict[str, Any], ...]:
        """The conversation that teaches it."""
        return (
            {"role": "user", "content": self.question},
            {"role": "assistant", "reasoning_content": worked(self.a, self.b), "content": self.answer},
        )


def sums(seed: int, *, split: Split = "train", digits: int = 2) -> Iterator[Sum]:
    """Endless sums of two numbers of at most `digits` digits; those held out add at least one held-out number."""
    draw = random.Random(f"sums {seed} {split}")
    while True:
        # The number of digits first, so that short numbers are not rare; the larger of two draws: long ones lead.
        a, b = (draw.randrange(10 ** max(draw.randint(1, digits), draw.randint(1, digits))) for _ in range(2))
        phrasing = draw.choice(PHRASINGS["+"])
        if (number_is_held_out(a) or number_is_held_out(b)) == (split == "heldout"):
            yield Sum(a, b, phrasing.format(a=a, b=b))


def number_is_held_out(number: int) -> bool:
    """Whether no training problem adds this number."""
    return is_held_out(hashlib.sha256(f"number {number}".encode()).hexdigest(), HELD_OUT_PER_THOUSAND)


def worked(a: int, b: int) -> str:
    """The reasoning."""
    carry, lines = 0, []
    for column, name in enumerate(COLUMNS[: max(len(str(a)), len(str(b)))]):
        x, y = (number // 10**column % 10 for number in (a, b))
        lines.append(f"{name} {x}+{y}+{carry}={x + y + carry:02}")
        carry = (x + y + carry) // 10
    return "\n".join(lines)
