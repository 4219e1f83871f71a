"""Seeded arithmetic questions with one checkable answer, for the first supervised stage and the first RL.

A problem is a sum, difference or product of small whole numbers in one of several phrasings. The split goes by the hash
of the numbers and the operation, not of the wording, so a held-out problem was never trained on in any phrasing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from glm5.data.corpus import Split, is_held_out

HELD_OUT_PER_THOUSAND = 100
PHRASINGS: dict[str, tuple[str, ...]] = {
    "+": ("What is {a} + {b}?", "Add {a} and {b}.", "{a} plus {b} is?", "Compute the sum of {a} and {b}."),
    "-": ("What is {a} - {b}?", "Subtract {b} from {a}.", "{a} minus {b} is?", "Take {b} away from {a}."),
    "*": ("What is {a} * {b}?", "Multiply {a} by {b}.", "{a} times {b} is?", "Compute the product of {a} and {b}."),
}


@dataclass(frozen=True)
class Problem:
    """One question and the digits of its answer."""

    question: str
    answer: str
    expression: str
    """`a op b`: the same for every phrasing."""

    def messages(self) -> list[dict[str, str]]:
        """The conversation that teaches the answer."""
        return [*self.prompt(), {"role": "assistant", "content": self.answer}]

    def prompt(self) -> list[dict[str, str]]:
        """The conversation that asks for it."""
        return [{"role": "user", "content": self.question}]


def problems(
    seed: int, count: int, *, split: Split = "train", largest: int = 20, operations: str = "+-*"
) -> Iterator[Problem]:
    """`count` problems of one split with numbers from 0 to `largest`; some may repeat."""
    draw = random.Random(f"arithmetic {seed} {split}")
    found = 0
    while found < count:
        operation = draw.choice(operations)
        a, b = draw.randint(0, largest), draw.randint(0, largest)
        if operation == "-" and b > a:
            a, b = b, a
        phrasing = draw.choice(PHRASINGS[operation])
        expression = f"{a} {operation} {b}"
        if split_of(expression) == split:
            found += 1
            answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
            yield Problem(phrasing.format(a=a, b=b), str(answer), expression)


def split_of(expression: str) -> Split:
    """Where a problem belongs."""
    digest = hashlib.sha256(expression.encode()).hexdigest()
    return "heldout" if is_held_out(digest, HELD_OUT_PER_THOUSAND) else "train"
