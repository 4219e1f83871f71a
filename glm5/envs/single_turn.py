"""One question, one answer: a pure generator with its grader as an environment."""

from __future__ import annotations

from dataclasses import dataclass, field

from glm5.envs.protocol import EpisodeLimits, Message, Observation, Questions, Reward, Task, Tool, UniformGroups
from glm5.envs.threads import in_own_thread


@dataclass(frozen=True)
class SingleTurn:
    """Asks a question of `questions` and scores the answer."""

    questions: Questions
    limits: EpisodeLimits = field(default_factory=EpisodeLimits)
    uniform_groups: UniformGroups = "drop"

    @property
    def name(self) -> str:
        """That of the questions."""
        return self.questions.name

    def task(self, seed: int, index: int) -> Task:
        """As the questions give it."""
        return self.questions.task(seed, index)

    def episode(self, task: Task) -> SingleTurnEpisode:
        """The question, asked once."""
        return SingleTurnEpisode(self.questions, task)


class SingleTurnEpisode:
    """Over after the first answer."""

    tools: tuple[Tool, ...] = ()

    def __init__(self, questions: Questions, task: Task) -> None:
        self.questions, self.task = questions, task
        self._answer: Message | None = None

    async def reset(self) -> Observation:
        """The question."""
        return Observation(self.task.messages)

    async def step(self, message: Message) -> Observation:
        """Keeps the answer."""
        self._answer = message
        return Observation(done=True)

    async def score(self) -> Reward:
        """That of the answer."""
        if self._answer is None:
            raise RuntimeError(f"{self.task.id} was scored before it was answered")
        return await in_own_thread(self.questions.score, self.task, self._answer)

    async def close(self) -> None:
        """Nothing is held."""
