"""What an environment is: tasks drawn by (seed, index), and a score for the model's answer.

A single-turn environment is a generator and a grader, both pure: the same (seed, index) is always the same task, so
a run that is resumed, or an evaluation that is repeated, sees the same tasks without storing them. The multi-turn
form (reset, step, score) builds on the same `Task` and `Reward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from glm5.scoring import Grade

Message = Mapping[str, Any]
"""A chat message: role, content and, of an assistant, reasoning_content and tool_calls."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to do."""

    id: str
    """Unique in its environment; names seed and index, so that the task can be made again."""
    messages: tuple[Message, ...]
    answer: str
    category: str
    """The part of the environment that results are broken down by."""


@dataclass(frozen=True, slots=True)
class Reward:
    """The score of one response, with its reason."""

    value: float
    grade: Grade

    @property
    def reason(self) -> str:
        """Why the value is what it is, for a person who reads rollouts."""
        return self.grade.reason


class EnvironmentFailure(Exception):
    """The environment itself broke (not the model): the sample has no reward and is tried again or dropped."""


class Environment(Protocol):
    """A source of tasks and their judge. Both methods are pure.

    `score` raises `EnvironmentFailure` when it cannot tell.
    """

    @property
    def name(self) -> str:
        """As written in run files, settings included: environments of one name are the same environment."""

    def task(self, seed: int, index: int) -> Task:
        """Task number `index` of the stream named by `seed`."""

    def score(self, task: Task, response: Message) -> Reward:
        """Judges an assistant message as `glm5.text.parse_assistant` returns it. Reasoning is not judged."""
