"""What a learner may have beside the model that it trains: other models, other data, and what it is measured by.

None of it is state: a run that is resumed is given the same again, or measures of other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from glm5.checkpoint import load_model
from glm5.data import Loader, open_dataset, open_mixture
from glm5.data.shards import tokenizer_sha256
from glm5.data.world_text import open_world
from glm5.errors import ConfigError
from glm5.model import GLM5
from glm5.rl.aids_config import AidsConfig, Measured, ReplayData
from glm5.rl.retention import Measure, Retention, bits_per_byte, skills
from glm5.text import Tokenizer
from glm5.train.loop import BatchSource
from glm5.train.run_directory import model_of


@dataclass(frozen=True, kw_only=True)
class Aids:
    """Everything is optional."""

    reference: GLM5 | None = None
    """What the KL term holds the policy to; by default the model as the learner is given it."""
    teachers: Mapping[str, GLM5] = field(default_factory=dict)
    """For distillation, by the name of the environment; `EVERY` for those that have no other."""
    replay: BatchSource | None = None
    """Batches of earlier stages: number `version * updates + i` goes with update i of a batch."""
    retention: Retention | None = None
    """Measures that join the metrics of the step that begins with the weights which they are of."""
    rewards: Retention | None = None
    """The same of held-out tasks (`held_out.py`); a run makes it of the environments that it is given."""

    def due(self, version: int | None) -> list[Retention]:
        """What is to be measured of the version; None: everything."""
        parts = [part for part in (self.retention, self.rewards) if part is not None]
        return [part for part in parts if version is None or part.due(version)]

    def measured(self, model: GLM5, version: int | None) -> dict[str, float]:
        """The values of what is due."""
        return {name: value for part in self.due(version) for name, value in part.measure(model).items()}


def check_vocabularies(model: GLM5, aids: Aids) -> None:
    """Raises ConfigError for a teacher or reference that has no logit for some of the policy's tokens. More do no harm:
    a published vocabulary is often padded."""
    tokens = model.config.vocab_size
    others = [(f"The teacher of {name}", teacher) for name, teacher in aids.teachers.items()]
    for what, other in [*others, *([("The reference", aids.reference)] if aids.reference is not None else [])]:
        if other.config.vocab_size < tokens:
            raise ConfigError(
                f"{what} has {other.config.vocab_size} tokens and the policy {tokens}, so it cannot judge all of them; "
                "take a model with the policy's tokenizer."
            )


def open_aids(
    config: AidsConfig, tokenizer: Tokenizer, *, attention: Literal["sparse", "dense"], given: Aids | None = None
) -> Aids:
    """The aids of a run. given: a caller's own objects, in place of settings. Raises ConfigError for both at once."""
    if given is not None:
        if config != AidsConfig():
            raise ConfigError("The learner's aids are given as settings and as objects; give them in one way.")
        return given
    return Aids(
        reference=None if config.reference is None else _other_model(config.reference, tokenizer),
        teachers=_teachers(config, tokenizer),
        replay=_replay(config.replay, tokenizer),
        retention=_retention(config.retention, tokenizer, attention),
    )


def _teachers(config: AidsConfig, tokenizer: Tokenizer) -> dict[str, GLM5]:
    return {
        name: model
        for teacher in config.teachers
        for model in [_other_model(teacher.path, tokenizer)]
        for name in teacher.environments
    }


def _other_model(path: Path, tokenizer: Tokenizer) -> GLM5:
    """A model that never learns; its tokens are those of the policy."""
    directory = model_of(path)
    if tokenizer_sha256(Tokenizer.from_pretrained(directory)) != tokenizer_sha256(tokenizer):
        raise ConfigError(f"{path} has another tokenizer than the parent, so their tokens cannot be compared.")
    return load_model(directory, dtype=torch.float32).requires_grad_(False)


def _replay(config: ReplayData, tokenizer: Tokenizer) -> Loader | None:
    if not config.data:
        return None
    data = open_mixture(config.data, tokenizer)
    return Loader(data, rows=config.rows, length=config.length, seed=config.seed, packing=config.packing)


def _retention(config: Measured, tokenizer: Tokenizer, attention: Literal["sparse", "dense"]) -> Retention | None:
    measures: list[Measure] = [
        bits_per_byte(
            open_dataset(path, tokenizer), path.name, documents=config.documents, length=config.length,
            attention=attention,
        )
        for path in config.heldout
    ]  # fmt: skip
    if config.world is not None:
        measures.append(skills(tokenizer, open_world(config.world), config.skills, attention=attention))
    return Retention(tuple(measures), config.every) if measures else None
