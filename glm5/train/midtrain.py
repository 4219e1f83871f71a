"""Mid-training: the context grows in steps, under a larger rotary base.

GLM-5 report, section 2.2 and appendix A: 32K, 128K and 200K tokens after 4K, rope base 1e4 to 1e6 at the start, rate
falling linearly from 4e-5 to 1e-5. A phase is (length, rows, steps); all phases are one run, so the optimiser keeps its
state, the schedule spans them, and a resumed run needs nothing but its step. Long documents are up-sampled by the
mixture of the data. Attention is dense: the sparse stages come after.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from glm5.data import Batch, Loader
from glm5.errors import ConfigError
from glm5.model import GLM5
from glm5.optim import OptimizerConfig, Schedule
from glm5.train.checks import check_counts, check_numbers
from glm5.train.job import (
    Data,
    Job,
    Parent,
    StageConfig,
    check_length,
    during,
    named,
    open_data,
    part_of,
    perform,
    sampler,
)  # fmt: skip
from glm5.train.loop import BatchSource, LoopConfig, Stage
from glm5.train.losses import language_loss
from glm5.train.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Some steps at one length."""

    length: int
    rows: int
    steps: int
    train_data: Data | None = None
    """Of this phase alone, such as long-context examples of its length; None: the data of the stage."""

    def __post_init__(self) -> None:
        check_counts(self, "length", "rows", "steps")


NANO_PHASES = (Phase(length=512, rows=4, steps=60), Phase(length=1024, rows=2, steps=60))
NANO_LOOP = LoopConfig(
    steps=120,
    optimizer=OptimizerConfig(lr=2e-3, embedding_lr_scale=4.0),
    schedule=Schedule(shape="linear", warmup_steps=5, final_fraction=0.25),
)


@dataclass(frozen=True, kw_only=True)
class MidtrainConfig(StageConfig):
    """One mid-training run. The phases set lengths and rows; `length` and `rows` mean nothing here."""

    phases: tuple[Phase, ...] = NANO_PHASES
    """Lengths that follow each other, each with its rows and its steps."""
    rope_theta: float | None = 1e6
    """The rotary base from now on; None keeps the parent's."""
    loop: LoopConfig = NANO_LOOP

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_theta is not None:
            check_numbers(self, "rope_theta", above=0)
        if self.warmup is not None:
            raise ConfigError("mid-training sets its rows by phases; leave warmup out.")
        planned = sum(phase.steps for phase in self.phases)
        if planned != self.loop.steps:
            raise ConfigError(f"the phases have {planned} steps and the loop {self.loop.steps}; make them equal.")


class Phases:
    """One loader after another; still a function of the step alone. `phases` are (steps, loader)."""

    def __init__(self, phases: Sequence[tuple[int, BatchSource]]) -> None:
        self.phases = phases

    @property
    def seed(self) -> int:
        """Of the first phase; those after it count on from there."""
        return self.phases[0][1].seed

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted over all phases; the last phase has no end."""
        for steps, loader in self.phases[:-1]:
            if step < steps:
                return loader.batch(step)
            step -= steps
        return self.phases[-1][1].batch(step)


def midtrain(
    config: MidtrainConfig, run_directory: Path, *, resume: bool = False, console: Console | None = None
) -> RunDirectory:
    """Trains the parent's model on longer and longer rows; gives the finished run."""
    return perform(midtrain_job(config), run_directory, resume=resume, console=console)


def midtrain_job(config: MidtrainConfig) -> Job:
    """The stage with its inputs opened."""
    parent = Parent(config)
    longest = max(phase.length for phase in config.phases)
    check_length(longest, parent.model_config)
    judge = parent.judge("dense", longest)
    loaders = []
    for i, phase in enumerate(config.phases):
        data = parent.data
        if phase.train_data is not None:
            data = open_data(phase.train_data, parent.tokenizer)
            parent.inputs[f"train_data of phase {i}"] = data.sha256
        seed = config.loop.seed + i
        loader = Loader(data, rows=phase.rows, length=phase.length, seed=seed, **part_of(config.loop))
        loaders.append((phase.steps, loader))
    stage = Stage(
        name="midtrain",
        loader=Phases(loaders),
        loss=functools.partial(
            language_loss, attention="dense", mtp_weight=config.mtp_weight, balance_weight=config.balance_weight,
            most=parent.most,
        ),
        learns=lambda name: ".indexer." not in name,
        evaluate=during(judge),
        sample=sampler(parent.tokenizer, config.prompts, "dense"),
    )  # fmt: skip

    def make_model() -> GLM5:
        model = parent.model()
        if config.rope_theta is not None:
            rope = {**model.config.rope_parameters, "rope_theta": config.rope_theta}
            model.config = dataclasses.replace(model.config, rope_parameters=rope)
        return model

    return parent.job(
        stage, make_model, judge=judge, row_length=longest,
        before=lambda model: named(f"before mid-training, rows of {longest}", judge, model),
    )  # fmt: skip
