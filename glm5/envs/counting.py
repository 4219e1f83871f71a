"""Counting to N, with a long tail of N: the lengths of real agents' answers in a task that a tiny model can learn.

N is log-normal: its 99th percentile is about twelve times its median (sigma 1.07), which is what makes a synchronous
run wait for its slowest sample. For benchmarks.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from math import exp

from glm5.envs.protocol import Message, Reward, Task
from glm5.scoring import Grade, Outcome

SIGMA = 1.07


@dataclass(frozen=True)
class Counting:
    """`median` and `largest` of the numbers that are counted to. Reward: the share of numbers until the first slip."""

    median: int = 6
    largest: int = 100

    @property
    def name(self) -> str:
        """With the lengths."""
        return f"counting/{self.median}/{self.largest}"

    def task(self, seed: int, index: int) -> Task:
        """One number; the category says how its length compares with the median."""
        draw = random.Random(f"{self.name} {seed} {index}")
        number = max(1, min(self.largest, round(self.median * exp(draw.gauss(0, SIGMA)))))
        question = {"role": "user", "content": f"Count from 1 to {number}."}
        category = "short" if number <= self.median else "long" if number <= 5 * self.median else "longest"
        answer = " ".join(map(str, range(1, number + 1)))
        return Task(f"{self.name}/{seed}/{index}", (question,), answer, category)

    def score(self, task: Task, response: Message) -> Reward:
        """Numbers too many cost as much as numbers that are missing."""
        said, wanted = re.findall(r"\d+", response.get("content") or ""), task.answer.split()
        right = next((i for i, pair in enumerate(zip(said, wanted, strict=False)) if pair[0] != pair[1]), None)
        right = min(len(said), len(wanted)) if right is None else right
        value = right / max(len(said), len(wanted))
        outcome: Outcome = "correct" if value == 1 else "incorrect" if said else "not_attempted"
        return Reward(value, Grade(outcome, f"{right} of {len(wanted)} numbers, {len(said)} said"))
