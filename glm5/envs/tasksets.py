"""Tasksets of `verifiers` v1 (MIT), when that package is installed: their prompts, scored by their own rewards.

    environment = taskset_environment(MyTaskset(MyTasksetConfig()))
    environment = named_taskset("my-taskset", {"setting": 3})       # one that is installed: --env verifiers:my-taskset

Takes tasks that are a prompt and are judged by the conversation alone: rewards and metrics that need no runtime. What
starts tool servers, containers or a harness of its own is refused by name; such a taskset runs unchanged in its own
harness against glm5's gateway, which records the tokens. Written for verifiers 0.4.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from glm5.envs.protocol import (
    EnvironmentFailure,
    EpisodeLimits,
    Message,
    Observation,
    Reward,
    Task,
    Tool,
    UniformGroups,
)
from glm5.errors import InputError
from glm5.scoring import Grade

MOST_TASKS = 100_000


def taskset_environment(taskset: Any, *, limits: EpisodeLimits | None = None) -> TasksetEnvironment:
    """The environment of a `verifiers.v1.Taskset`. Raises `InputError` when it needs more than a conversation."""
    return TasksetEnvironment(taskset, limits or EpisodeLimits())


def named_taskset(name: str, settings: Mapping[str, Any]) -> TasksetEnvironment:
    """The environment of an installed taskset by its id, with settings of its config.

    Raises `InputError` without verifiers or such a taskset, for settings that it has not, and as `taskset_environment`.
    """
    try:
        from verifiers import v1
    except ImportError:
        raise InputError("Tasksets of verifiers need that package: pip install verifiers.") from None
    if not name:
        raise InputError("Which taskset? Write verifiers:ID, the name of its package.")
    try:
        config = v1.taskset_config_type(name).model_validate({**settings, "id": name})
        taskset = v1.load_taskset(config)
    except ImportError as error:
        reason = error.__cause__ or error
        raise InputError(
            f"The taskset {name!r} of verifiers cannot be imported ({reason}); install its package."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"The taskset {name!r} of verifiers cannot be made: {' '.join(str(error).split())}") from None
    return taskset_environment(taskset)


@dataclass(frozen=True)
class TasksetEnvironment:
    """A taskset's tasks in an order that the seed fixes, again and again."""

    taskset: Any
    limits: EpisodeLimits = field(default_factory=EpisodeLimits)
    uniform_groups: UniformGroups = "drop"

    def __post_init__(self) -> None:
        kind = type(self.taskset).__name__
        if not self._tasks:
            raise InputError(f"{kind} loads no task.")
        needed = _needs(self.taskset, self._tasks[0])
        if needed:
            raise InputError(f"{kind} needs {needed}; run it in its own harness through the gateway instead.")

    @property
    def name(self) -> str:
        """With the settings of the taskset."""
        return f"verifiers/{type(self.taskset).__name__}/{self.taskset.config.model_dump_json(exclude_defaults=True)}"

    def task(self, seed: int, index: int) -> Task:
        """The id ends in the place in the taskset."""
        turn, place = divmod(index, len(self._tasks))
        chosen = self._order(seed, turn)[place]
        data = self._tasks[chosen].data
        return Task(f"{self.name}/{seed}/{index}/{chosen}", _messages(data), answer="", category=data.name or "all")

    def episode(self, task: Task) -> TasksetEpisode:
        """One answer."""
        return TasksetEpisode(task, self._tasks[int(task.id.rsplit("/", 1)[1])])

    @cached_property
    def _tasks(self) -> list[Any]:
        return list(itertools.islice(self.taskset, MOST_TASKS))

    @cached_property
    def _order(self) -> Callable[[int, int], list[int]]:
        return lru_cache(maxsize=8)(self._shuffled)

    def _shuffled(self, seed: int, turn: int) -> list[int]:
        order = list(range(len(self._tasks)))
        random.Random(f"{self.name}/{seed}/{turn}").shuffle(order)
        return order


class TasksetEpisode:
    """Over after the first answer."""

    tools: tuple[Tool, ...] = ()

    def __init__(self, task: Task, theirs: Any) -> None:
        self._task, self._theirs = task, theirs
        self._answer: Message | None = None

    async def reset(self) -> Observation:
        """The prompt."""
        return Observation(self._task.messages)

    async def step(self, message: Message) -> Observation:
        """Keeps the answer."""
        self._answer = message
        return Observation(done=True)

    async def score(self) -> Reward:
        """The sum of the taskset's weighted rewards, asked with a trace of the conversation."""
        if self._answer is None:
            raise RuntimeError(f"{self._task.id} was scored before it was answered")
        try:
            trace = _trace(self._theirs, self._task.messages, self._answer)
            await self._theirs.score(trace)
        except Exception as error:
            raise EnvironmentFailure(f"the rewards of {self._task.id} raised {error!r}", "verifier") from error
        missing = [name for name, reward in trace.rewards.items() if reward is None]
        if missing or not trace.rewards:
            raise EnvironmentFailure(f"{self._task.id} has no value for the rewards {missing}", "verifier")
        value = float(trace.reward)
        parts = ", ".join(f"{name} {reward.value:g}" for name, reward in trace.rewards.items())
        return Reward(value, Grade("correct" if value > 0 else "incorrect", parts, judged=False))

    async def close(self) -> None:
        """Nothing is held."""


def _needs(taskset: Any, task: Any) -> str:
    """What it takes beyond a conversation."""
    from verifiers.v1.task import Task as Plain

    kind = type(task)
    if type(taskset).toolsets(taskset.config) or kind.toolsets(task.config):
        return "tool servers"
    if kind.NEEDS_CONTAINER:
        return "a container"
    if kind.setup is not Plain.setup or kind.finalize is not Plain.finalize:
        return "a runtime for its setup"
    for hook in (*task.hooks("reward"), *task.hooks("metric")):
        parameter = inspect.signature(hook).parameters.get("runtime")
        if parameter is not None and parameter.default is parameter.empty:
            return f"a runtime for {hook.__name__}"
    return ""


def _messages(data: Any) -> tuple[Message, ...]:
    system = ({"role": "system", "content": data.system_prompt},) if data.system_prompt else ()
    if data.prompt is None:
        raise InputError(
            f"task {data.idx} of the taskset has no prompt; its user is simulated, which is not supported."
        )
    if isinstance(data.prompt, str):
        return (*system, {"role": "user", "content": data.prompt})
    return (*system, *(message.model_dump(mode="json", exclude_none=True) for message in data.prompt))


def _trace(task: Any, prompt: tuple[Message, ...], answer: Message) -> Any:
    """The conversation as their record of a rollout: a chain of messages of which the last was sampled."""
    from pydantic import TypeAdapter
    from verifiers.v1.configs.agent import AgentConfig
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.trace import AgentInfo, Trace, TraceTask
    from verifiers.v1.types import Message as Theirs

    said = {key: value for key, value in answer.items() if key in ("role", "content", "reasoning_content")}
    nodes = [
        MessageNode(parent=place - 1 if place else None, message=message, sampled=place == len(prompt))
        for place, message in enumerate(map(TypeAdapter(Theirs).validate_python, (*prompt, said)))
    ]
    record = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    return Trace(task=record, agent=AgentInfo(config=AgentConfig()), nodes=nodes, is_completed=True, ok=True)
