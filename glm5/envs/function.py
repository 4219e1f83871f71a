"""A Python function as an environment: questions from anywhere, and a reward function.

    environment = single_questions("capitals", [("Capital of France?", "Paris"), ...], right_text)

Questions are pairs (question, answer), whole tasks, or a function that draws a pair from a `random.Random`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from glm5.envs.protocol import EpisodeLimits, Message, Reward, Task, UniformGroups
from glm5.envs.rewards import RewardFunction, rewarded, right_text
from glm5.envs.single_turn import SingleTurn
from glm5.errors import InputError

Pair = tuple[str, str]
Drawing = Callable[[random.Random], Pair]


def single_questions(
    name: str,
    questions: Sequence[Pair | Task] | Drawing,
    reward: RewardFunction = right_text,
    *,
    limits: EpisodeLimits | None = None,
    uniform_groups: UniformGroups = "drop",
) -> SingleTurn:
    """An environment of single questions; `name` must change when the questions or the reward do."""
    source: Listed | Drawn = Drawn(name, questions, reward) if callable(questions) else Listed(name, questions, reward)
    return SingleTurn(source, limits or EpisodeLimits(), uniform_groups)


class Drawn:
    """Endless questions: a function that draws one from a generator of its own."""

    def __init__(self, name: str, draw: Drawing, reward: RewardFunction) -> None:
        self.name, self._draw, self._reward = name, draw, reward

    def task(self, seed: int, index: int) -> Task:
        """Drawn with a generator that (name, seed, index) fix."""
        question, answer = self._draw(random.Random(f"{self.name}/{seed}/{index}"))
        return _task(f"{self.name}/{seed}/{index}", question, answer)

    def score(self, task: Task, response: Message) -> Reward:
        """That of the function."""
        return rewarded(self._reward, task, response)


class Listed:
    """A list of questions, gone through again and again; every pass has an order that the seed fixes."""

    def __init__(self, name: str, questions: Sequence[Pair | Task], reward: RewardFunction) -> None:
        if not questions:
            raise InputError(f"the environment {name} has no question; give it at least one.")
        self.name, self._questions, self._reward = name, tuple(questions), reward
        self._order = lru_cache(maxsize=8)(self._shuffled)

    def task(self, seed: int, index: int) -> Task:
        """Question `index` of the passes that `seed` names."""
        turn, place = divmod(index, len(self._questions))
        found = self._questions[self._order(seed, turn)[place]]
        name = f"{self.name}/{seed}/{index}"
        return replace(found, id=name) if isinstance(found, Task) else _task(name, *found)

    def score(self, task: Task, response: Message) -> Reward:
        """That of the function."""
        return rewarded(self._reward, task, response)

    def _shuffled(self, seed: int, turn: int) -> list[int]:
        order = list(range(len(self._questions)))
        random.Random(f"{self.name}/{seed}/{turn}").shuffle(order)
        return order


def _task(name: str, question: str, answer: str) -> Task:
    return Task(id=name, messages=({"role": "user", "content": question},), answer=answer, category="all")
