"""What an environment is: tasks drawn by (seed, index), and episodes in which a model does one and is scored.

    task = environment.task(seed, index)
    episode = environment.episode(task)
    observation = await episode.reset()                 # the messages that the conversation begins with, and tools
    while not observation.done:
        observation = await episode.step(message)       # the assistant's message, parsed; what the environment answers
    reward = await episode.score()
    await episode.close()                               # always, whatever happened before

Tasks are pure: the same (seed, index) is always the same task, so a run that is resumed, or an evaluation that is
repeated, sees the same tasks without storing them. The special case of one question and one answer is `Questions`:
a generator and a grader, both pure; `SingleTurn` makes an environment of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from glm5.scoring import Grade

Message = Mapping[str, Any]
"""A chat message: role, content and, of an assistant, reasoning_content and tool_calls."""
Tool = Mapping[str, Any]
"""A function that the model may call, as OpenAI's API describes it."""


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
    """The score of one response or episode, with its reason."""

    value: float
    grade: Grade

    @property
    def reason(self) -> str:
        """Why the value is what it is, for a person who reads rollouts."""
        return self.grade.reason


LARGEST_REWARD = 1e6
"""By size. A larger one drowns what all others say, and near the largest float there is no mean."""
FailureKind = Literal["crash", "timeout", "unreachable", "verifier"]
"""crash: it raised. timeout: it did not answer in time. unreachable: its server could not be asked. verifier: what was
done could not be judged."""
UniformGroups = Literal["drop", "keep"]


class EnvironmentFailure(Exception):
    """The environment itself broke (not the model): the sample has no reward and is tried again or dropped."""

    def __init__(self, message: str, kind: FailureKind = "crash") -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment says: messages that are added to the conversation."""

    messages: tuple[Message, ...] = ()
    done: bool = False
    """Nothing more is asked of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    """Where an episode ends at the latest. `None`: no limit but the run's own."""

    turns: int = 1
    """Answers of the model. The last one ends the episode, which is then scored as it stands."""
    seconds: float | None = None
    """From reset to score, by the wall clock; past it the outcome is `timeout`, without a reward."""
    step_seconds: float | None = None
    """For each call of the environment; past it the environment has failed."""
    attempts: int | None = None
    """How often a group is begun at most, when its environment fails."""


class Episode(Protocol):
    """One task being done, by one model. Any method raises `EnvironmentFailure` when the environment broke."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the model may call, all through the episode."""

    async def reset(self) -> Observation:
        """Begins; the first messages, never `done`."""

    async def step(self, message: Message) -> Observation:
        """Takes the assistant's message as `glm5.text.parse_assistant` gives it (reasoning, content, tool calls)."""

    async def score(self) -> Reward:
        """Judges what was done. Called once, after the last step."""

    async def close(self) -> None:
        """Gives back processes, files and connections. May be called at any moment, and never raises."""


class Environment(Protocol):
    """A source of tasks and of episodes."""

    @property
    def name(self) -> str:
        """As written in run files, settings included: environments of one name are the same environment."""

    @property
    def limits(self) -> EpisodeLimits:
        """Of every episode."""

    @property
    def uniform_groups(self) -> UniformGroups:
        """What becomes of a group whose rewards are all equal, which has no gradient of its own.

        "drop" (dynamic sampling) where such a task is only too easy or too hard. "keep" where all-wrong groups are what
        must be seen, as in tasks that reward "I don't know".
        """

    def task(self, seed: int, index: int) -> Task:
        """Task number `index` of the stream named by `seed`. Pure."""

    def episode(self, task: Task) -> Episode:
        """A new episode of the task; starts nothing before `reset`."""


class Questions(Protocol):
    """The special case of single questions. Both methods are pure.

    `score` raises `EnvironmentFailure` when it cannot tell.
    """

    @property
    def name(self) -> str:
        """As that of an `Environment`."""

    def task(self, seed: int, index: int) -> Task:
        """Task number `index` of the stream named by `seed`."""

    def score(self, task: Task, response: Message) -> Reward:
        """Judges an assistant message as `glm5.text.parse_assistant` returns it. Reasoning is not judged."""
