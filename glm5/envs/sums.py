"""Sums to be worked out in a thought: the numbers and wordings of `glm5.data.addition`, with its split by number."""

from __future__ import annotations

from glm5.data.addition import sums
from glm5.data.corpus import Split
from glm5.envs.protocol import Message, Reward, Task
from glm5.errors import ConfigError
from glm5.scoring import MAX_DIGITS, grade_number


class Sums:
    """Reward 1 for the right number, 0 otherwise. `digits`: most digits of a number that is added."""

    def __init__(self, *, split: Split = "train", digits: int = 2) -> None:
        if not 1 <= digits < MAX_DIGITS:
            raise ConfigError(f"sums of numbers of {digits} digits cannot be graded; take from 1 to {MAX_DIGITS - 1}.")
        self.name = f"sums/{split}/{digits}"
        self.split: Split = split
        self.digits = digits

    def task(self, seed: int, index: int) -> Task:
        """One sum as a single user message; the category is the length of the longer number."""
        one = next(sums((seed << 32) + index, split=self.split, digits=self.digits))
        return Task(
            id=f"{self.name}/{seed}/{index}",
            messages=({"role": "user", "content": one.question},),
            answer=one.answer,
            category=f"{len(str(max(one.a, one.b)))} digits",
        )

    def score(self, task: Task, response: Message) -> Reward:
        """Compares the last number of the answer (not of the reasoning) with the right one."""
        grade = grade_number(response.get("content") or "", task.answer)
        return Reward(1.0 if grade.correct else 0.0, grade)
