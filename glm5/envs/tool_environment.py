"""Questions that are answered with tools: the model calls, reads the results, and ends with an answer.

    environment = ToolEnvironment(questions, tools=[calculator])

The first message without a call ends the episode and is scored. A tool's error is a message to the model; the
infrastructure's is an `EnvironmentFailure` (`glm5.envs.toolbox`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from glm5.envs.protocol import EpisodeLimits, Message, Observation, Questions, Reward, Task, Tool, UniformGroups
from glm5.envs.rewards import reward_of
from glm5.envs.threads import in_own_thread
from glm5.envs.toolbox import Function, Toolbox

Judge = Callable[[Task, Sequence[Message]], Reward | float]
"""Of a whole conversation: what the model said and what the tools answered, without the question."""


@dataclass(frozen=True)
class ToolEnvironment:
    """`tools`: functions, or a function that makes those of one episode, which then may share a state."""

    questions: Questions
    tools: Sequence[Function] | Callable[[Task], Sequence[Function]]
    limits: EpisodeLimits = field(default_factory=lambda: EpisodeLimits(turns=8))
    uniform_groups: UniformGroups = "drop"
    judge: Judge | None = None
    """Instead of the questions' own score, which sees the last message only."""
    name: str = ""
    """As an environment's. By default those of the questions and tools and, of a judge, the hash of its source too."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self._own_name())

    def _own_name(self) -> str:
        tools = _called(self.tools) if callable(self.tools) else "+".join(map(_called, self.tools)) or "no tools"
        judge = [] if self.judge is None else [f"{_called(self.judge)}-{_source_hash(self.judge)}"]
        return "/".join([self.questions.name, tools, *judge])

    def task(self, seed: int, index: int) -> Task:
        """As the questions give it."""
        return self.questions.task(seed, index)

    def episode(self, task: Task) -> ToolEpisode:
        """The question, with the tools on offer."""
        functions = self.tools(task) if callable(self.tools) else self.tools
        return ToolEpisode(task, Toolbox(functions), self._score)

    def _score(self, task: Task, said: Sequence[Message]) -> Reward:
        if self.judge is None:
            return self.questions.score(task, said[-1])
        given = self.judge(task, said)
        return given if isinstance(given, Reward) else reward_of(given, task)


def _called(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _source_hash(function: Callable[..., object]) -> str:
    """Of its text, or of its name where Python has none."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = _called(function)
    return sha256(text.encode()).hexdigest()[:8]


class ToolEpisode:
    """Over with the first message that calls nothing."""

    def __init__(self, task: Task, toolbox: Toolbox, score: Callable[[Task, Sequence[Message]], Reward]) -> None:
        self._task, self._toolbox, self._score = task, toolbox, score
        self._said: list[Message] = []

    @property
    def tools(self) -> tuple[Tool, ...]:
        """As the toolbox describes them."""
        return self._toolbox.tools

    async def reset(self) -> Observation:
        """The question."""
        return Observation(self._task.messages)

    async def step(self, message: Message) -> Observation:
        """The results of the calls in `message`, side by side; done when there are none."""
        self._said.append(message)
        calls = message.get("tool_calls")
        if not calls:
            return Observation(done=True)
        results = await self._toolbox.answer(calls)
        self._said += results
        return Observation(results)

    async def score(self) -> Reward:
        """Of the last message of the model, even when that was a call: the limit of turns may have ended it."""
        if not self._said:
            raise RuntimeError(f"{self._task.id} was scored before it was answered")
        last = max(i for i, message in enumerate(self._said) if message["role"] == "assistant")
        return await in_own_thread(self._score, self._task, self._said[: last + 1])

    async def close(self) -> None:
        """Nothing is held."""
