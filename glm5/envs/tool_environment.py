"""Questions that are answered with tools: the model calls, reads the results, and ends with an answer.

    environment = ToolEnvironment(questions, tools=[calculator])

The first message without a call ends the episode and is scored. A tool's error is a message to the model; the
infrastructure's is an `EnvironmentFailure` (`glm5.envs.toolbox`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from glm5.envs.function_hash import function_hash
from glm5.envs.protocol import EpisodeLimits, Message, Observation, Questions, Reward, Task, Tool, UniformGroups
from glm5.envs.rewards import reward_of
from glm5.envs.threads import in_own_thread
from glm5.envs.toolbox import Function, Toolbox
from glm5.errors import ConfigError

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
    """As an environment's. By default those of the questions and tools and, of a judge, a hash of what it does; raises
    ConfigError for a judge of which that cannot be told (`function_hash.py`)."""

    def __post_init__(self) -> None:
        if not self.name or isinstance(self.name, _Derived):
            object.__setattr__(self, "name", _Derived(self._own_name()))

    def _own_name(self) -> str:
        tools = _called(self.tools) if callable(self.tools) else "+".join(map(_called, self.tools)) or "no tools"
        if self.judge is None:
            return f"{self.questions.name}/{tools}"
        known = function_hash(self.judge)
        if known is None:
            raise ConfigError(
                f"The judge {_called(self.judge)} is no plain function with its source at hand, bound to nothing but "
                "numbers and texts, so two such judges could not be told apart: give the environment a name=."
            )
        return f"{self.questions.name}/{tools}/{_called(self.judge)}-{known}"

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


class _Derived(str):
    """A name that nobody gave: a copy with other parts (`dataclasses.replace`) makes its own."""


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
