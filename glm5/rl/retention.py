"""What reinforcement learning must not cost: bits per byte of held-out text, and earlier skills, measured on the way.

A `Retention` is a set of named measures of a model, taken every so many versions; the values join the run's metrics
under `retention/NAME`, and `forgetting` compares the last with the first. The remedies are settings of the learner: a
`replay` of the batches of earlier stages beside the policy loss, and a KL term to the model of the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from glm5.data import TokenDataset
from glm5.data.world import World
from glm5.engine import Engine
from glm5.errors import ConfigError
from glm5.evals.skills import SkillsConfig, evaluate_skills
from glm5.model import GLM5
from glm5.text import Tokenizer
from glm5.train.evaluate import evaluate_bits_per_byte

Measure = Callable[[GLM5], dict[str, float]]
"""Named values of a model. A name that ends in "bits_per_byte" is better when lower, every other when higher."""
PREFIX = "retention/"


@dataclass(frozen=True)
class Retention:
    """What is measured, and at which versions: 0, `every`, 2 `every`, ..."""

    measures: tuple[Measure, ...]
    every: int = 20

    def __post_init__(self) -> None:
        if self.every < 1 or not self.measures:
            raise ConfigError("Retention needs something to measure, every 1 version or more.")

    def due(self, version: int) -> bool:
        """Whether the weights of this version are to be measured."""
        return version % self.every == 0

    @torch.no_grad()
    def measure(self, model: GLM5) -> dict[str, float]:
        """All values; the model is as before afterwards."""
        training = model.training
        model.eval()
        try:
            return {f"{PREFIX}{name}": value for part in self.measures for name, value in part(model).items()}
        finally:
            model.train(training)


def bits_per_byte(
    dataset: TokenDataset, name: str, *, documents: int | None = None, length: int = 256, rows: int = 16,
    attention: Literal["dense", "sparse"] = "sparse",
) -> Measure:  # fmt: skip
    """Of held-out text (`glm5.train.evaluate`), under `NAME/bits_per_byte`."""

    def measure(model: GLM5) -> dict[str, float]:
        found = evaluate_bits_per_byte(
            model, dataset, documents=documents, length=length, rows=rows, attention=attention
        )
        return {f"{name}/bits_per_byte": found.bits_per_byte}

    return measure


def skills(
    tokenizer: Tokenizer, world: World, config: SkillsConfig | None = None, *,
    attention: Literal["dense", "sparse"] = "sparse",
) -> Measure:  # fmt: skip
    """The suite that a model had to pass after SFT (`glm5 eval --suite skills`): the share of right answers of each."""

    def measure(model: GLM5) -> dict[str, float]:
        engine = Engine(model, tokenizer, attention=attention)
        try:
            result, _ = evaluate_skills(engine, world, config)
        finally:
            engine.close()
        return {skill.name: skill.share.value for skill in result.skills}

    return measure


def forgetting(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How much worse each measure is in the last of a run's metrics than in the first; below 0 where it is better."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(PREFIX):
                first.setdefault(name, value)
                last[name] = value
    return {
        name.removeprefix(PREFIX): (last[name] - value) * (1 if name.endswith("bits_per_byte") else -1)
        for name, value in first.items()
    }
