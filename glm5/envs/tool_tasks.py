"""Two environments with tools that are ready to use: a calculator, and lookups in the closed world.

The calculator has the schema and the wordings of the supervised stage (`glm5.data.tool_chats`), so the bundled recipe's
models can use it at once. A lookup asks for a fact, or for a fact of a fact ("the currency of the country of Arlo"),
which takes one call behind the other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from glm5.data.corpus import Split
from glm5.data.tool_chats import ToolRequests
from glm5.data.tools import CALCULATOR
from glm5.data.world import Fact, World
from glm5.envs.protocol import Message, Reward, Task
from glm5.envs.rewards import right_number
from glm5.envs.tool_environment import ToolEnvironment
from glm5.errors import ConfigError
from glm5.scoring import Grade, grade_exact


def calculator(a: int, operation: Literal["plus", "minus", "times"], b: int) -> dict[str, int]:
    """Calculates with two whole numbers."""
    return {"result": {"plus": a + b, "minus": a - b, "times": a * b}[operation]}


@dataclass(frozen=True)
class Calculations:
    """Requests to use the calculator; 1 for the right number. The splits differ in wordings and numbers."""

    split: Split = "train"

    @property
    def name(self) -> str:
        """With the split."""
        return f"calculator/{self.split}"

    def task(self, seed: int, index: int) -> Task:
        """One request; the category is the operation."""
        requests = ToolRequests((seed << 32) + index, (), self.split, tools_shown=1)
        request = requests.request((CALCULATOR,))
        answer = calculator(**request.arguments)["result"]
        question = {"role": "user", "content": request.question}
        return Task(f"{self.name}/{seed}/{index}", (question,), str(answer), request.arguments["operation"])

    def score(self, task: Task, response: Message) -> Reward:
        """By the last number of the answer."""
        return right_number(task, response)


def calculator_environment(split: Split = "train") -> ToolEnvironment:
    """The requests with the tool."""
    questions = Calculations(split)
    return ToolEnvironment(questions, tools=[calculator], name=f"{questions.name}/tools")


@dataclass(frozen=True)
class Lookups:
    """Questions that `lookup` answers in `hops` calls; 1 for the right text. Asks about the practised facts only."""

    world: World
    hops: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if not self._chains:
            raise ConfigError(f"no question about this world takes {self.hops} hops.")

    @property
    def name(self) -> str:
        """With the world and the hops."""
        return f"lookup/{self.world.config.entities}.{self.world.config.seed}/{self.hops}"

    def task(self, seed: int, index: int) -> Task:
        """The category is the relation that is asked for last."""
        chain = random.Random(f"{self.name} {seed} {index}").choice(self._chains)
        subject = chain[0].entity.name
        for fact in chain:
            subject = f"the {fact.relation.noun} of {subject}"
        question = {"role": "user", "content": f"Look up: what is {subject}?"}
        return Task(f"{self.name}/{seed}/{index}", (question,), chain[-1].value, chain[-1].relation.noun)

    def score(self, task: Task, response: Message) -> Reward:
        """By the answer, which is the value, or a sentence that ends with it."""
        content = response.get("content") or ""
        grade = grade_exact(content, task.answer)
        if not grade.correct and content.casefold().rstrip(" .").endswith(f" {task.answer.casefold()}"):
            grade = Grade("correct", "a sentence that ends with the expected text", task.answer)
        return Reward(float(grade.correct), grade)

    def lookup(self, entity: str, relation: str) -> dict[str, str]:
        """Looks up a relation of an entity, such as the capital of a country."""
        found = self._values.get((entity.casefold(), relation.casefold().removeprefix("the ")))
        if found is None:
            raise LookupError(f"nothing is known of the {relation} of {entity}")
        return {"value": found}

    @cached_property
    def _values(self) -> dict[tuple[str, str], str]:
        facts = [fact for fact in self.world.facts if fact.practised]
        return {(fact.entity.name.casefold(), fact.relation.noun): fact.value for fact in facts}

    @cached_property
    def _chains(self) -> list[tuple[Fact, ...]]:
        known = list(self.world.practised())
        if self.hops == 1:
            return [(fact,) for fact in known]
        of: dict[str, list[Fact]] = {}
        for fact in known:
            of.setdefault(fact.entity.name, []).append(fact)
        return [(first, second) for first in known for second in of.get(first.value, ())]


def lookup_environment(world: World, hops: Literal[1, 2] = 1) -> ToolEnvironment:
    """The questions with the tool."""
    lookups = Lookups(world, hops)
    tools: list[Any] = [lookups.lookup]
    return ToolEnvironment(lookups, tools=tools, name=f"{lookups.name}/tools")
