"""Reads from a run directory what the simulator needs to know of the run: its settings and its record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm5.envs.protocol import UniformGroups
from glm5.errors import InputError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import recorded_scheduler
from glm5.rl.event_log import events_of
from glm5.rl.events import BatchMade, Dropped, Finished, Requeued
from glm5.rl.journal import read_journal
from glm5.rl.records import Rollout
from glm5.rl.session import JOURNAL
from glm5.rl.simulation.workload import rollout_record
from glm5.rl.tasks import TaskSource
from glm5.train import RunDirectory


def records_of(run_directory: Path) -> Iterator[dict[str, Any]]:
    """Rollouts, learning steps and, for each step, the mean speed of the engines at the mean number of sequences.

    A lap of the run's `speed.jsonl` ends when a step was learnt from; the rollouts that came back before its batch was
    made stand for what the engines did in it. That is exact in sync mode and nearly so otherwise. Raises InputError for
    a run that noted no times.
    """
    run = RunDirectory.open(run_directory)
    laps = {line["step"]: line for line in run.read("speed")}
    if not laps and run.read("metrics"):
        timeless = run.description["inputs"].get("clock") == "deterministic"
        how = "runs in deterministic mode note none; give one that was made without" if timeless else "let it go on"
        raise InputError(f"{run.path} has no step whose times are known: {how}.")
    tokens: dict[str, int] = {}
    """Sampled, of rollouts without a fate."""
    window: list[Rollout] = []
    for line in read_journal(run.path / JOURNAL):
        for event in events_of(line):
            if isinstance(event, Finished):
                tokens[event.rollout.id] = event.rollout.num_sampled
                window.append(event.rollout)
                yield rollout_record(event.rollout)
            elif isinstance(event, BatchMade):
                learnt = sum(tokens.pop(ticket.id) for one in event.selections for ticket in one.tickets)
                if lap := laps.get(event.step):
                    yield {"kind": "train", "seconds": lap["learning_seconds"], "tokens": learnt}
                    yield from _engine(lap, window)
                window = []
            elif isinstance(event, Dropped | Requeued):
                tokens.pop(event.ticket.id, None)


def settings_of(run_directory: Path) -> tuple[SchedulerConfig, tuple[TaskSource, ...]]:
    """The scheduler of a run, and how its environments take part, but for curricula: a record does not hold these.

    Raises RunError for a run of another kind.
    """
    run = RunDirectory.open(run_directory)
    sources = []
    for name, text in run.description["inputs"].items():
        if name.startswith("tasks of "):
            said = dict(word.split("=", 1) for word in text.split(", ") if "=" in word)
            keep: UniformGroups = "keep" if said.get("uniform_groups") == "keep" else "drop"
            places, attempts = (int(said[key]) if key in said else None for key in ("max_running", "max_attempts"))
            sources.append(
                TaskSource(
                    environment=name.removeprefix("tasks of "), weight=float(said.get("weight", 1.0)),
                    uniform_groups=keep, max_running=places, max_attempts=attempts,
                )
            )  # fmt: skip
    return recorded_scheduler(run), tuple(sources)


def _engine(lap: dict[str, Any], window: list[Rollout]) -> Iterator[dict[str, Any]]:
    busy = lap["seconds"] * (1 - lap["sampler_idle"])
    waited = sum(turn.seconds for rollout in window for turn in rollout.turns)
    tokens = sum(len(turn.output_ids) for rollout in window for turn in rollout.turns)
    if busy > 0 and tokens and waited >= busy / 2:
        yield {"kind": "engine", "running": max(1, round(waited / busy)), "tokens_per_second": tokens / busy}
