"""What the benchmarks of reinforcement learning start from: small tasks of reasoning-gym, models that half know them.

Policy gradients need a model that is sometimes right. The bundled `nano` has never seen these tasks; a short
supervised warm-up on problems of other seeds teaches it the form, and so much of the task that a sample is right now
and then. All arms of a comparison start from the same warmed model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reasoning_gym

from glm5.bundled import bundled_model
from glm5.data import chat_documents, write_dataset
from glm5.data.chat import Chat
from glm5.data.corpus import Split
from glm5.envs import Counting, EpisodeLimits, Message, Observation, ReasoningGym, Reward, Task, Tool, UniformGroups
from glm5.optim import OptimizerConfig, Schedule
from glm5.text import Tokenizer
from glm5.train import LoopConfig, SFTConfig
from glm5.train.sft import sft

WARM_SEED = 9_000_001
"""First seed of the warm-up's problems; tasks of runs and evaluations have seeds far below."""
PROBLEMS = 4000


@dataclass(frozen=True)
class GymTask:
    """One task of reasoning-gym at a size that a model of 3.6M parameters can learn."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    length: int = 128
    """Of the warm-up's rows."""
    warm_steps: int = 40
    """Chosen so that the first sampled reward lies well between 0 and 1; the figure is printed, not assumed."""
    in_words: float = 0.0
    """Share of the warm-up's answers, which are numbers then, that are in words. The verifier wants digits, so a model
    that has learnt from them may know an answer and still has to learn how it is to be said."""

    @property
    def label(self) -> str:
        """The name with the settings, in letters of file names."""
        words = [f"words={self.in_words:g}"] if self.in_words else []
        return "-".join([self.name, *(f"{key}={value}" for key, value in sorted(self.settings.items())), *words])

    def chats(self) -> Iterator[Chat]:
        """Endless problems with their answers."""
        draw = random.Random(WARM_SEED)
        for seed in itertools.count(WARM_SEED):
            for item in reasoning_gym.create_dataset(self.name, size=500, seed=seed, **self.settings):
                answer = str(item["answer"])
                if draw.random() < self.in_words:
                    answer = number_in_words(int(answer))
                yield Chat(
                    ({"role": "user", "content": item["question"]}, {"role": "assistant", "content": answer}),
                    skill=self.name,
                )


UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_in_words(number: int) -> str:
    """Of a number between -99 and 99."""
    if number < 0:
        return f"minus {number_in_words(-number)}"
    if number < 20:
        return UNITS[number]
    tens, units = TENS[number // 10 - 2], number % 10
    return f"{tens}-{UNITS[units]}" if units else tens


ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TASKS = {"chain_sum": GymTask("chain_sum", ONE_DIGIT)}
"""Of the benchmarks that compare speed."""


def environment(task: GymTask, split: Split = "train") -> ReasoningGym:
    """The task's questions, judged by reasoning-gym's own verifier."""
    return ReasoningGym(task.name, task.settings, split=split)


@dataclass(frozen=True)
class CountingAloud:
    """Counting with a listener: the model says a number, the environment "next", until N is reached.

    N is log-normal (`glm5.envs.Counting`), so most episodes have a few turns and some have very many. Reward: the share
    of numbers until the first slip.
    """

    questions: Counting = field(default_factory=lambda: Counting(median=4, largest=40))
    uniform_groups: UniformGroups = "drop"

    @property
    def name(self) -> str:
        """That of the questions, aloud."""
        return f"aloud/{self.questions.name}"

    @property
    def limits(self) -> EpisodeLimits:
        """One turn a number."""
        return EpisodeLimits(turns=self.questions.largest)

    def task(self, seed: int, index: int) -> Task:
        """As the questions give it."""
        return self.questions.task(seed, index)

    def episode(self, task: Task) -> CountingEpisode:
        """A listener."""
        return CountingEpisode(self.questions, task)


class CountingEpisode:
    """Listens until all numbers are said, or a wrong one is."""

    tools: tuple[Tool, ...] = ()

    def __init__(self, questions: Counting, task: Task) -> None:
        self.questions, self._task, self.said = questions, task, list[str]()

    async def reset(self) -> Observation:
        """The question."""
        return Observation(self._task.messages)

    async def step(self, message: Message) -> Observation:
        """The next number."""
        self.said.append((message.get("content") or "").strip())
        wanted = self._task.answer.split()
        if len(self.said) == len(wanted) or self.said[-1] != wanted[len(self.said) - 1]:
            return Observation(done=True)
        return Observation(({"role": "user", "content": "next"},))

    async def score(self) -> Reward:
        """As if all had been said at once."""
        return self.questions.score(self._task, {"role": "assistant", "content": " ".join(self.said)})

    async def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class AloudTask:
    """What a model learns `CountingAloud` from."""

    name: str = "counting_aloud"
    length: int = 448
    warm_steps: int = 6

    @property
    def label(self) -> str:
        """The name."""
        return self.name

    def chats(self) -> Iterator[Chat]:
        """Endless episodes without a slip."""
        questions = CountingAloud().questions
        for index in itertools.count():
            task = questions.task(WARM_SEED, index)
            turns: list[dict[str, str]] = [dict(task.messages[0])]
            for number in task.answer.split():
                turns += [{"role": "assistant", "content": number}, {"role": "user", "content": "next"}]
            yield Chat(tuple(turns[:-1]), skill=self.name)


def warmed(task: GymTask | AloudTask, work: Path) -> Path:
    """The model directory that runs on `task` start from; made once below `work`."""
    tokenizer = Tokenizer.from_pretrained(bundled_model())
    data = work / f"warm-{task.label}-data"
    if not data.exists():
        write_dataset(data, chat_documents(itertools.islice(task.chats(), PROBLEMS), tokenizer), tokenizer)
    config = SFTConfig(
        parent=bundled_model(), train_data=data, attention="sparse", rows=16, length=task.length,
        loop=LoopConfig(
            steps=task.warm_steps, seed=0, router_bias_rate=0.0, spike_factor=None,
            optimizer=OptimizerConfig(lr=3e-3, embedding_lr_scale=4.0),
            schedule=Schedule(shape="cosine", warmup_steps=5, final_fraction=0.1),
        ),
    )  # fmt: skip
    run = work / f"warm-{task.label}-{task.warm_steps}"
    return sft(config, run, resume=(run / "run.json").exists()).model_directory
