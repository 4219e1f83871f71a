"""Questions about the closed world, with a reward for saying "I don't know" where nothing can be known.

Only the taught part is asked about, and of it only what conversations may practise. A share of the questions has no
answer: names that nobody bears, and relations that an entity does not have (`glm5.data.instruct.Strangers`). Right,
abstaining and wrong each have their reward, so that the model learns when to answer (ternary rewards as in TruthRL,
arXiv 2509.25760). Groups of equal rewards are kept: where all are wrong is just where abstaining must be learnt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from glm5.data.instruct import UNKNOWN, Strangers
from glm5.data.world import Fact, World
from glm5.data.world_text import Phrasing, questions
from glm5.envs.protocol import EpisodeLimits, Message, Reward, Task
from glm5.envs.single_turn import SingleTurn
from glm5.errors import ConfigError
from glm5.scoring import grade_fact

SEPARATOR = " | "
"""Between the texts that are right answers to a task."""


@dataclass(frozen=True, kw_only=True)
class FactRewards:
    """What an answer is worth. With a group of k right and w wrong samples, abstaining at 0 pays when w > k."""

    right: float = 1.0
    wrong: float = -1.0
    abstained: float = 0.0
    """"I don't know" to a question that the text answers."""
    honest: float = 1.0
    """"I don't know" where nothing can be known."""

    def __post_init__(self) -> None:
        if not (self.wrong < self.abstained <= self.right and self.wrong < self.honest):
            raise ConfigError("an answer must be worth: wrong < abstained <= right, and wrong < honest.")


@dataclass(frozen=True)
class Facts:
    """Single questions. `unknown`: the share that has no answer. `phrasing` "heldout": other wordings and strangers."""

    world: World
    unknown: float = 0.25
    rewards: FactRewards = FactRewards()
    phrasing: Phrasing = "train"
    exposures: tuple[int, ...] = (1, 4, 16, 64)
    """Of the facts that are asked about."""

    def __post_init__(self) -> None:
        if not 0 <= self.unknown <= 1 or not self._facts:
            raise ConfigError("the share of unknown questions is from 0 to 1, and some exposure must have facts.")

    @property
    def name(self) -> str:
        """All that the questions and rewards depend on."""
        world, worth = self.world.config, self.rewards
        values = f"{worth.right:g},{worth.wrong:g},{worth.abstained:g},{worth.honest:g}"
        seen = ",".join(map(str, self.exposures))
        return f"facts/{world.entities}.{world.seed}/{self.phrasing}/{seen}/{self.unknown:g}/{values}"

    def task(self, seed: int, index: int) -> Task:
        """The category is the exposure of the fact, or "unknown"."""
        draw = random.Random(f"facts {seed} {index}")
        if draw.random() < self.unknown:
            text, _ = Strangers(self.world, draw.getrandbits(48), self.phrasing).question()
            return self._task(seed, index, text, UNKNOWN, "unknown")
        fact = draw.choice(self._facts)
        question = draw.choice(questions(fact, self.phrasing))
        answers = SEPARATOR.join((question.answer, *question.aliases))
        return self._task(seed, index, question.text, answers, f"exposure {fact.exposure}")

    def score(self, task: Task, response: Message) -> Reward:
        """By the answer alone; an empty one is wrong."""
        content, worth = response.get("content") or "", self.rewards
        grade = grade_fact(content, task.answer.split(SEPARATOR))
        if task.category == "unknown":
            honest = grade.outcome == "not_attempted" and bool(content.strip())
            return Reward(worth.honest if honest else worth.wrong, grade)
        if grade.outcome == "not_attempted" and content.strip():
            return Reward(worth.abstained, grade)
        return Reward(worth.right if grade.correct else worth.wrong, grade)

    @cached_property
    def _facts(self) -> list[Fact]:
        return [fact for fact in self.world.practised() if fact.exposure in self.exposures]

    def _task(self, seed: int, index: int, text: str, answer: str, category: str) -> Task:
        message = {"role": "user", "content": text}
        return Task(f"{self.name}/{seed}/{index}", messages=(message,), answer=answer, category=category)


def facts_environment(facts: Facts, limits: EpisodeLimits | None = None) -> SingleTurn:
    """The questions as an environment whose uniform groups are kept."""
    return SingleTurn(facts, limits or EpisodeLimits(), uniform_groups="keep")
