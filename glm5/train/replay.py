"""One step of a run, computed again: the batch as text, and the numbers beside those that the run wrote down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glm5.data import Batch
from glm5.errors import RunError
from glm5.optim import rate_at, set_rate
from glm5.text import Tokenizer
from glm5.train.loop import compute, metrics_of, prepare, update
from glm5.train.run_directory import RunDirectory
from glm5.train.stages import config_of, job_of


@dataclass(frozen=True)
class Replayed:
    """A step as it is now, and as it was."""

    step: int
    restored: int
    """The step of the checkpoint from which it was computed."""
    values: dict[str, Any]
    recorded: dict[str, Any] | None
    """The line in `metrics.jsonl`; None when the run never got that far."""
    texts: tuple[str, ...]
    """The rows of the batch; documents are separated, padding is left out."""

    @property
    def equal(self) -> bool:
        """Whether every number that was computed again is the recorded one, to the bit."""
        return self.recorded is not None and all(self.recorded.get(k) == v for k, v in self.values.items())

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """name -> (recorded, now) of the numbers that are not equal."""
        old = self.recorded or {}
        return {name: (old.get(name), now) for name, now in self.values.items() if old.get(name) != now}


def replay_step(run_directory: Path, step: int) -> Replayed:
    """Restores the newest checkpoint at or before `step` (or the beginning), and computes on to it. Writes nothing.

    Raises RunError when the run's inputs are not those that it was started with, or the step is not one of its.
    """
    run = RunDirectory.open(run_directory)
    config = config_of(run)
    if not 0 <= step < config.loop.steps:
        raise RunError(f"{run.path} has the steps 0 to {config.loop.steps - 1}; step {step} is none of them.")
    job = job_of(config)
    for name, was in {**run.description["inputs"], "parent": run.description["parent"]}.items():
        now = job.parent if name == "parent" else job.inputs.get(name)
        if now != was:
            raise RunError(f"{name} of {run.path} is no longer what it was; a step of it cannot be computed again.")
    model = job.make_model()
    optimizers = prepare(job.stage, model, config.loop)
    first = run.load_checkpoint(model, optimizers, at_most=step)
    recorded = {line["step"]: line for line in run.read("metrics")}
    model.train()
    for number in range(first, step + 1):
        fraction = rate_at(config.loop.schedule, number, config.loop.steps)
        set_rate(optimizers, fraction)
        batch = job.stage.loader.batch(number)
        found = compute(job.stage, model, batch, config.loop)
        if number < step and "skipped" not in recorded.get(number, {}):
            update(model, optimizers, found.loads, config.loop)
        model.zero_grad(set_to_none=True)
    values = metrics_of(step, found, fraction * config.loop.optimizer.lr)
    return Replayed(step, first, values, recorded.get(step), batch_texts(batch, job.tokenizer))


def batch_texts(batch: Batch, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Every row as text, with a line between its documents."""
    rows = []
    for ids_T, segments_T in zip(batch.input_ids_BT, batch.segment_ids_BT, strict=True):
        segments = torch.unique_consecutive(segments_T[segments_T >= 0]).tolist()
        texts = [tokenizer.decode(ids_T[segments_T == segment].tolist()) for segment in segments]
        rows.append("\n--- next document ---\n".join(texts))
    return tuple(rows)
