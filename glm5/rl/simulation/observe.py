"""Reads from a run directory what the simulator needs to know of the run: its settings and its record."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm5.errors import InputError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.config import recorded_concurrency, recorded_scheduler
from glm5.rl.event_log import events_of, pieces_of
from glm5.rl.events import BatchMade, Cancelled, Dropped, Finished, Requeued
from glm5.rl.journal import read_journal
from glm5.rl.records import Rollout, Ticket
from glm5.rl.session import JOURNAL
from glm5.rl.simulation.measured import rollout_record
from glm5.rl.tasks import Band, Gate, Pools, TaskSource
from glm5.train import RunDirectory

PARTS: dict[str, type[Any]] = {"Band": Band, "Gate": Gate, "Pools": Pools}
"""Of a `TaskSource`."""


def records_of(run_directory: Path) -> Iterator[dict[str, Any]]:
    """Rollouts, those that were called off or never ended among them; and for each learning step its time, that of its
    publication, and what the engines did in it.

    A lap of the run's `speed.jsonl` ends when a step was learnt from; the turns of the rollouts that came back before
    its batch was made stand for those of the lap. Raises InputError for a run that noted no times.
    """
    run = RunDirectory.open(run_directory)
    laps = {line["step"]: line for line in run.read("speed")}
    if not laps and run.read("metrics"):
        timeless = run.description["inputs"].get("clock") == "deterministic"
        how = "runs in deterministic mode note none; give one that was made without" if timeless else "let it go on"
        raise InputError(f"{run.path} has no step whose times are known: {how}.")
    engines = _engines(run)
    tokens: dict[str, int] = {}
    """Sampled, of rollouts without a fate."""
    open: dict[Ticket, dict[int, int]] = {}
    """Tokens of each turn, of rollouts that have not come back."""
    window: list[Rollout] = []
    for line in read_journal(run.path / JOURNAL):
        for piece in pieces_of(line):
            open.setdefault(piece.ticket, {})[piece.number] = piece.first + len(piece.turn.output_ids)
        for event in events_of(line):
            if isinstance(event, Finished):
                open.pop(event.rollout.ticket, None)
                tokens[event.rollout.id] = event.rollout.num_sampled
                window.append(event.rollout)
                yield rollout_record(event.rollout)
            elif isinstance(event, Cancelled):
                yield from _open_record(event.ticket, open.pop(event.ticket, {}))
            elif isinstance(event, BatchMade):
                learnt = sum(tokens.pop(ticket.id) for one in event.selections for ticket in one.tickets)
                if lap := laps.get(event.step):
                    yield {"kind": "train", "seconds": lap["learning_seconds"], "tokens": learnt}
                    if lap.get("publishing_seconds"):
                        yield {"kind": "publish", "seconds": lap["publishing_seconds"]}
                    yield from _sampled(lap, window, engines)
                window = []
            elif isinstance(event, Dropped | Requeued):
                tokens.pop(event.ticket.id, None)
    for ticket, turns in open.items():
        yield from _open_record(ticket, turns)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run was told."""

    scheduler: SchedulerConfig
    sources: tuple[TaskSource, ...]
    """How its environments take part, in order; none of a run that did not record it."""
    concurrency: ConcurrencyConfig | None
    engines: int
    """1 where the command line did not say."""


def settings_of(run_directory: Path) -> RunSettings:
    """Raises RunError for a run of another kind."""
    run = RunDirectory.open(run_directory)
    words = {name: text for name, text in run.description["inputs"].items() if name.startswith("tasks of ")}
    return RunSettings(
        scheduler=recorded_scheduler(run),
        sources=tuple(_source(name.removeprefix("tasks of "), text) for name, text in words.items()),
        concurrency=recorded_concurrency(run),
        engines=_engines(run),
    )


def _source(name: str, text: str) -> TaskSource:
    """From the words of a run's record (`run_ends.drawn`): weight=2.0, uniform_groups=keep, band=Band(low=0.1, ...)."""
    if "=" not in text:
        return TaskSource(environment=name)
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return TaskSource(environment=name, **{word.arg: _value(word.value) for word in call.keywords if word.arg})


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return PARTS[node.func.id](**{word.arg: _value(word.value) for word in node.keywords if word.arg})
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _engines(run: RunDirectory) -> int:
    said = ((run.description.get("config") or {}).get("command") or {}).get("engines", {})
    return max(1, len(said.get("server", ())) or said.get("engines", 1))


def _open_record(ticket: Ticket, turns: dict[int, int]) -> Iterator[dict[str, Any]]:
    """Of a rollout of which only the beginning is known; none without a token."""
    if any(turns.values()):
        yield {"kind": "rollout", "environment": ticket.environment, "group": ticket.group.id,
               "turn_tokens": [turns[number] for number in sorted(turns)], "turn_seconds": [], "tool_seconds": 0.0,
               "outcome": "aborted", "reward": None}  # fmt: skip


def _sampled(lap: dict[str, Any], window: list[Rollout], engines: int) -> Iterator[dict[str, Any]]:
    busy, turns = lap["seconds"] * (1 - lap["sampler_idle"]), [turn for rollout in window for turn in rollout.turns]
    waited, tokens = sum(turn.seconds for turn in turns), sum(len(turn.output_ids) for turn in turns)
    yield {"kind": "sampled", "tokens": round(lap["tokens_per_second"] * lap["seconds"]), "seconds": busy * engines,
           "turn_tokens": tokens, "turn_seconds": waited}  # fmt: skip
