"""Arithmetic questions with one right number: the smallest verifiable environment."""

from __future__ import annotations

from glm5.data.arithmetic import problems
from glm5.data.corpus import Split
from glm5.envs.protocol import Message, Reward, Task
from glm5.errors import ConfigError
from glm5.scoring import MAX_DIGITS, grade_number

CATEGORIES = {"+": "addition", "-": "subtraction", "*": "multiplication"}


class Arithmetic:
    """Reward 1 for the right number, 0 otherwise. The questions are those of the supervised stage's generator.

    `split` "train" or "heldout": no problem of one is in the other, in any wording. `largest`: of the numbers that are
    asked about. `operations`: any of "+-*".
    """

    def __init__(self, *, split: Split = "train", largest: int = 20, operations: str = "+-*") -> None:
        if not 0 <= largest < 10 ** (MAX_DIGITS // 2):
            raise ConfigError(
                f"arithmetic cannot grade such numbers; take a `largest` from 0 to one of {MAX_DIGITS // 2} digits."
            )
        self.name = f"arithmetic/{split}/{largest}/{operations}"
        self.split: Split = split
        self.largest = largest
        self.operations = operations

    def task(self, seed: int, index: int) -> Task:
        """One question as a single user message; the category is the operation."""
        # Each task has a generator of its own, so that task 10,000 costs no more than task 0.
        own_seed = (seed << 32) + index
        problem = next(problems(own_seed, 1, split=self.split, largest=self.largest, operations=self.operations))
        return Task(
            id=f"{self.name}/{seed}/{index}",
            messages=tuple(problem.prompt()),
            answer=problem.answer,
            category=CATEGORIES[problem.expression.split()[1]],
        )

    def score(self, task: Task, response: Message) -> Reward:
        """Compares the last number of the answer (not of the reasoning) with the right one."""
        grade = grade_number(response.get("content") or "", task.answer)
        return Reward(1.0 if grade.correct else 0.0, grade)
