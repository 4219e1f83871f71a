"""A training step again, from the journal alone: no engine, no environment, the same loss and gradient to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from glm5.checkpoint import load_model
from glm5.errors import RunError
from glm5.rl.aids import Aids, open_aids
from glm5.rl.config import PACE, RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.events import BatchMade, Dropped, Finished, Requeued
from glm5.rl.journal import read_journal
from glm5.rl.learner import Learner
from glm5.rl.records import Batch, Metrics, Rollout
from glm5.rl.run_ends import measures
from glm5.rl.session import JOURNAL
from glm5.text import Tokenizer
from glm5.train import RunDirectory
from glm5.train.recorded import OPERATIONAL, RunChanged, first_difference, plain, with_defaults, without_paths
from glm5.train.run_directory import directory_sha256, model_of


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A step of a run, learnt from once more."""

    batch: Batch
    values: Metrics
    """What the learner said this time."""
    recorded: Metrics
    """Its line in the run's metrics; empty if that is gone."""

    @property
    def same(self) -> bool:
        """Whether loss and gradient norm are those of the run, to the bit."""
        return all(self.values.get(name) == self.recorded.get(name) for name in ("loss", "grad_norm"))


def batches_of(journal: Path) -> Iterator[Batch]:
    """Every batch of a journal, in order."""
    rollouts: dict[str, Rollout] = {}
    for record in read_journal(journal):
        for event in events_of(record):
            if isinstance(event, Finished):
                rollouts[event.rollout.id] = event.rollout
            elif isinstance(event, BatchMade):
                yield Batch(event.step, event.step, tuple(s.group(rollouts) for s in event.selections))
                for selection in event.selections:
                    for ticket in selection.tickets:
                        del rollouts[ticket.id]
            elif isinstance(event, Dropped | Requeued):
                rollouts.pop(event.ticket.id, None)


def replay_step(config: RLRunConfig, run_directory: Path, step: int, *, aids: Aids | None = None) -> ReplayedStep:
    """Learns from the batch of a step again, from the newest checkpoint before it (or from the parent) on.

    config, aids: the run's own. Raises RunError for a step that the journal does not hold, and when parent, settings or
    aids are others than the run's.
    """
    run = RunDirectory.open(run_directory)
    check_same(config, run)
    parent = model_of(config.parent)
    aids = open_aids(config.aids, Tokenizer.from_pretrained(parent), attention=config.learner.attention, given=aids)
    model = load_model(parent, dtype=torch.float32)
    recorded_config = with_defaults(run.description["config"], config)
    learner = Learner(
        model, config.learner, steps=recorded_config["steps"], aids=aids,
        publish_every=recorded_config["scheduler"]["publish_every"],
        temperature=recorded_config["rollout"]["temperature"],
    )  # fmt: skip
    learner.version = run.load_checkpoint(learner.module, learner.optimizers, at_most=step)
    for batch in batches_of(run.path / JOURNAL):
        if batch.step < learner.version:
            continue
        values = learner.step(batch)
        if batch.step == step:
            recorded = next((line for line in run.read("metrics") if line["step"] == step), {})
            return ReplayedStep(batch, values, recorded)
    begun = max((batch.step for batch in batches_of(run.path / JOURNAL)), default=-1) + 1
    raise RunError(f"{run.path / JOURNAL} holds no batch of step {step}, but those of {begun} steps, counted from 0.")


def check_same(config: RLRunConfig, run: RunDirectory) -> None:
    """Raises `RunChanged` when the run had another parent, or other settings or aids."""
    inputs = config.aids.inputs()
    now = {"config": plain(config), "inputs": inputs, "parent": directory_sha256(model_of(config.parent))}
    then = {
        "config": with_defaults(run.description["config"], config),
        "inputs": {name: run.description["inputs"].get(name) for name in inputs},
        "parent": run.description["parent"],
    }
    free = OPERATIONAL | PACE | {"steps"} | measures(run.path, inputs)
    change = first_difference(without_paths(then), without_paths(now), free=free)
    if change is not None:
        raise RunChanged(run.path, change)
