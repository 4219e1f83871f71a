"""A scored evaluation: one model on tasks 0..n-1 of an environment, with intervals, and every answer kept.

Tasks, random numbers and grading are functions of the seed, so the same evaluation of the same model gives the same
numbers. An environment failure is counted apart and is never a wrong answer. Written are `result.json` and
`samples.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm5.engine import Engine, RequestOutput, SamplingParams
from glm5.envs import EnvironmentFailure, Questions, Reward, Task
from glm5.errors import ConfigError, InputError
from glm5.files import replacing, write_json
from glm5.scoring import Accuracy, accuracy
from glm5.text import parse_assistant


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is asked and how it is sampled."""

    tasks: int = 100
    """How many questions."""
    seed: int = 1
    """Of the tasks and of the random numbers."""
    temperature: float = 0.0
    """At which answers are sampled; 0: the likeliest token."""
    max_tokens: int = 16
    """Of one answer."""
    thinking: bool = False
    """Let the model reason before it answers; it must have been taught to."""

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise ConfigError(f"tasks is {self.tasks}; it must be at least 1.")


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One answer with its score; `reward` is None when the environment failed."""

    task: Task
    output: RequestOutput
    reward: Reward | None

    def record(self) -> dict[str, Any]:
        """The answer as a JSON object."""
        graded: dict[str, Any] = {"outcome": "environment_failure", "reward": None, "reason": None, "extracted": None}
        if self.reward is not None:
            grade = self.reward.grade
            graded = {"reward": self.reward.value, "outcome": grade.outcome, "reason": grade.reason,
                      "extracted": grade.extracted}  # fmt: skip
        return {"id": self.task.id, "category": self.task.category, "messages": list(self.task.messages),
                "answer": self.task.answer, "text": self.output.text, "token_ids": self.output.token_ids,
                "finish_reason": self.output.finish_reason, "versions": sorted(set(self.output.versions)),
                **graded}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The numbers of an evaluation."""

    environment: str
    config: EvalConfig
    accuracy: Accuracy
    categories: dict[str, Accuracy]
    failures: int
    """Answers that the environment could not score; they are in none of the counts."""
    truncated: int
    """Answers that the length limit cut; they are scored as they are."""

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`."""
        whole = asdict(self)
        whole["accuracy"]["value"] = self.accuracy.value
        for name, part in self.categories.items():
            whole["categories"][name]["value"] = part.value
        return whole


def evaluate(engine: Engine, env: Questions, config: EvalConfig | None = None) -> tuple[EvalResult, list[ScoredAnswer]]:
    """Asks every task once. Raises `InputError` when the engine has no tokenizer or a prompt does not fit."""
    config = config or EvalConfig()
    if engine.tokenizer is None:
        raise InputError("An evaluation needs a tokenizer; give a model directory that holds one.")
    tasks = [env.task(config.seed, index) for index in range(config.tasks)]
    prompts = [
        engine.tokenizer.apply_chat_template(task.messages, enable_thinking=config.thinking, escape_special=True)
        for task in tasks
    ]
    params = [
        SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=(config.seed << 32) + index)
        for index in range(config.tasks)
    ]
    outputs = engine.generate(prompts, params)
    answers = [_scored(env, task, output, config.thinking) for task, output in zip(tasks, outputs, strict=True)]
    return summarise(env.name, config, answers), answers


def summarise(environment: str, config: EvalConfig, answers: Sequence[ScoredAnswer]) -> EvalResult:
    """The numbers over all scored answers and over each category, categories by name."""
    scored = [answer for answer in answers if answer.reward is not None]
    grades = {answer.task.id: answer.reward.grade for answer in scored if answer.reward is not None}
    categories = sorted({answer.task.category for answer in scored})
    return EvalResult(
        environment=environment,
        config=config,
        accuracy=accuracy(grades.values()),
        categories={
            name: accuracy(grades[answer.task.id] for answer in scored if answer.task.category == name)
            for name in categories
        },
        failures=len(answers) - len(scored),
        truncated=sum(answer.output.finish_reason == "length" for answer in answers),
    )


def write_evaluation(directory: Path, result: EvalResult, answers: Sequence[ScoredAnswer]) -> None:
    """Writes `result.json` and `samples.jsonl` into `directory`, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / "samples.jsonl") as file:
        file.write("".join(json.dumps(a.record(), ensure_ascii=False) + "\n" for a in answers).encode())
    write_json(directory / "result.json", {"kind": "evaluation", **result.to_json()})


def _scored(env: Questions, task: Task, output: RequestOutput, thinking: bool) -> ScoredAnswer:
    message = parse_assistant(output.text, thinking=thinking)
    try:
        return ScoredAnswer(task, output, env.score(task, message))
    except EnvironmentFailure:
        return ScoredAnswer(task, output, None)
