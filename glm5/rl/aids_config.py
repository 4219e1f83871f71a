"""The learner's aids as settings: models and datasets by their paths, which a run opens when it begins or is resumed.

They are part of `run.json`, with the hashes of what was there among its inputs, so a resumed run and the replay of a
step learn with the same aids, or are refused; what a run is measured by may change (`comparable.py`).
`glm5.rl.aids.open_aids` makes the objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from glm5.data import Share, open_dataset, open_mixture
from glm5.data.mixture import Packing
from glm5.data.world_text import open_world, world_sha256
from glm5.errors import ConfigError
from glm5.evals.skills import SkillsConfig
from glm5.train.checks import check_choice, check_counts
from glm5.train.run_directory import directory_sha256, model_of

HELDOUT, WORLD, TASKS = "heldout ", "retention world", "held-out tasks of "
MEASURED = (HELDOUT, WORLD, TASKS)
"""How the names of inputs begin by which a run is measured: a resumed run may have others, under other names."""
EVERY = "*"
"""Stands for every environment that has no teacher of its own."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model to learn from, on the answers that the policy itself gives (`distillation.py`)."""

    path: Path
    """A run or a model directory with the tokenizer of the parent."""
    environments: tuple[str, ...] = (EVERY,)
    """Names of those that it teaches; by default all that have no other teacher."""


@dataclass(frozen=True, kw_only=True)
class ReplayData:
    """Text of earlier stages, learnt beside every update; `learner.replay_weight` is the weight of its loss."""

    data: tuple[Share, ...] = ()
    """Datasets with their shares; none: no replay."""
    rows: int = 4
    """Of each batch."""
    length: int = 256
    """Tokens in a row."""
    packing: Packing = "cut"
    """keep_whole for conversations."""
    seed: int = 0
    """Of the order of the rows."""

    def __post_init__(self) -> None:
        check_counts(self, "rows", "length")
        check_counts(self, "seed", least=0)
        check_choice(self, "packing", "cut", "keep_whole")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What must not be lost, measured of version 0, `every`, 2 `every`, ... (`retention.py`)."""

    heldout: tuple[Path, ...] = ()
    """Datasets of held-out text: bits per byte, each under the name of its directory."""
    world: Path | None = None
    """A world of `glm5 data world`: the skills suite that the model passed after SFT."""
    every: int = 20
    """Versions between two measurements."""
    documents: int | None = 12
    """Of each held-out dataset; None: all."""
    length: int = 256
    """Tokens in a row of held-out text."""
    skills: SkillsConfig = field(default_factory=SkillsConfig)
    """How much is asked."""

    def __post_init__(self) -> None:
        check_counts(self, "every", "length", *(["documents"] if self.documents is not None else []))
        names = Counter(path.name for path in self.heldout)
        for name, count in names.items():
            if count > 1:
                raise ConfigError(f"{count} held-out datasets are called {name!r}; rename a directory.")


@dataclass(frozen=True, kw_only=True)
class AidsConfig:
    """By default there are none."""

    teachers: Annotated[tyro.conf.UseAppendAction[tuple[Teacher, ...]], tyro.conf.arg(name="teacher")] = ()
    """A teacher and the environments that it teaches, by default all that have no other. May be given several times."""
    reference: Path | None = None
    """The model that `learner.kl` holds the policy to; by default the parent."""
    replay: ReplayData = field(default_factory=ReplayData)
    retention: Measured = field(default_factory=Measured)

    def __post_init__(self) -> None:
        taught = Counter(name for teacher in self.teachers for name in teacher.environments)
        for name, count in taught.items():
            if count > 1:
                where = "all environments" if name == EVERY else name
                raise ConfigError(f"{where} has {count} teachers; say which environments each teaches.")

    def renamed(self, names: Mapping[str, str]) -> AidsConfig:
        """With the environments of the teachers by their full names, where they are in `names` by shorter ones."""
        return replace(
            self,
            teachers=tuple(
                replace(teacher, environments=tuple(names.get(name, name) for name in teacher.environments))
                for teacher in self.teachers
            ),
        )

    def check_environments(self, names: list[str]) -> None:
        """Raises ConfigError for a teacher of nothing, and for an environment that nobody teaches while others are."""
        taught = {name for teacher in self.teachers for name in teacher.environments}
        for name in sorted(taught - {EVERY} - set(names)):
            raise ConfigError(f"A teacher is for {name!r}, which is no environment of the run: {', '.join(names)}.")
        for name in names if taught and EVERY not in taught else ():
            if name not in taught:
                raise ConfigError(f"{name} has no teacher; give it one, or one teacher for all that have none.")

    def inputs(self) -> dict[str, str]:
        """SHA-256 of everything that is read, by what it is."""
        found = {
            f"teacher of {' and '.join(teacher.environments)}": directory_sha256(model_of(teacher.path))
            for teacher in self.teachers
        }
        if self.reference is not None:
            found["reference"] = directory_sha256(model_of(self.reference))
        if self.replay.data:
            found["replay"] = open_mixture(self.replay.data).sha256
        found |= {f"{HELDOUT}{path.name}": open_dataset(path).sha256 for path in self.retention.heldout}
        if self.retention.world is not None:
            open_world(self.retention.world)
            found[WORLD] = world_sha256(self.retention.world)
        return found
