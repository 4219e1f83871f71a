"""`glm5 rl --simulate`: throughput, idle shares and staleness of a run that is not made.

glm5 rl --simulate --tokens.median 400 --tokens.p99 6000 --tool-seconds.median 2 --tool-seconds.p99 30
glm5 rl --simulate --like runs/rl --bounds 1 2 4 8         # lengths, latencies and speeds of a run that was made
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from glm5.errors import InputError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.simulation import (
    AssumedWorkload,
    EngineSpeed,
    LongTail,
    Measured,
    SimulationConfig,
    Spreads,
    comparison,
    records_of,
    settings_of,
    shortness,
    spread_of,
    sweep,
    write_page,
)
from glm5.rl.tasks import TaskSource
from glm5.train import RunDirectory


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Predict a run in virtual time, with the scheduler of real runs: sync, one-step-off and async side by side."""

    simulate: bool = True
    """Predict a run instead of making one."""
    like: Path | None = None
    """Take lengths, latencies, success, speeds and the scheduler's settings from this run; what is given all the same
    is tried instead."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    bounds: tuple[int, ...] = (1, 2, 4, 8)
    """Staleness bounds of the asynchronous runs."""
    concurrency: tuple[int, ...] = ()
    """Rollouts at once, several to compare; the scheduler's max_running when left out."""
    tokens: LongTail = field(default_factory=lambda: LongTail(200, 2000))
    """Sampled per turn."""
    turns: int = 1
    """Of an episode."""
    tool_seconds: LongTail = field(default_factory=lambda: LongTail(0, 0))
    """Of the environment, after each turn."""
    engine: EngineSpeed = field(default_factory=EngineSpeed)
    train_seconds: float = 5.0
    """Of a learning step."""
    publish_seconds: float = 1.0
    """From trained to held by the engines."""
    shared: float = 1.0
    """Speed of trainer and engines while both work: 1 on devices of their own, 0.5 when they share one."""
    batches: int = 50
    """Learning steps that are simulated; the first five are not counted."""
    draws: int = 5
    """Times that everything is simulated again with other random numbers, and from a record of --like that is drawn
    anew, for the standard deviation of the steps per hour; 0: not."""
    seed: int = 0
    """Of lengths, latencies and rewards."""
    out: Path | None = None
    """Write a page with charts."""
    json: bool = False
    """Print one JSON object."""


def run(arguments: Sequence[str]) -> int:
    """Simulates and prints the comparison."""
    parse = functools.partial(tyro.cli, SimulateOptions, prog="glm5 rl", args=list(arguments))
    options, records = parse(), None
    config = settings(options)
    if options.like is not None:
        scheduler, sources = settings_of(options.like)
        options = parse(default=replace(SimulateOptions(), scheduler=scheduler))
        records = list(records_of(options.like))
        measured = Measured.from_records(records)
        config = settings(options).as_measured(measured, sources=_of_all(sources, measured))
    grid = {"max_staleness": options.bounds, "max_running": options.concurrency}
    found = sweep(config, **grid)
    spread = spread_of(config, records, draws=options.draws, **grid) if options.draws > 1 else Spreads((), 0)
    spreads = spread.steps_per_hour
    warning = None if records is None else shortness(records)
    left_out = spread.left_out
    made = None if options.like is None else what_happened(options.like)
    if options.out is not None:
        write_page(found, options.out, spreads)
    if options.json:
        simulations = [it.to_dict() | {"steps_per_hour_spread": s} for it, s in zip_longest(found, spreads)]
        print(json.dumps({"simulations": simulations, "run": made, "warning": warning,
                          "draws_left_out": left_out}))  # fmt: skip
        return 0
    print(comparison(found, spreads))
    if made is not None:
        print(
            f"\n{options.like} itself: {made['mode']}, {made['steps_per_hour']:.0f} steps/h, trainer idle "
            f"{made['trainer_idle']:.0%}, sampler idle {made['sampler_idle']:.0%}, staleness {made['staleness']:.2f}"
        )
    if left_out:
        print(f"Warning: {left_out} draws held nothing to learn from and are left out of the deviation, which is "
              "larger than said.", file=sys.stderr)  # fmt: skip
    if warning is not None:
        print(f"Warning: {warning}", file=sys.stderr)
    if options.out is not None:
        Console().print(f"page: {options.out}", soft_wrap=True)
    return 0


def settings(options: SimulateOptions) -> SimulationConfig:
    """What is assumed, where nothing was measured. Raises InputError for a bound that is none."""
    if min(options.bounds, default=0) < 0:
        raise InputError(f"--bounds has {min(options.bounds)}; a staleness bound is 0 or more versions.")
    return SimulationConfig(
        scheduler=options.scheduler,
        workloads={
            "tasks": AssumedWorkload(tokens=options.tokens, turns=options.turns, tool_seconds=options.tool_seconds)
        },
        engine=options.engine,
        train_seconds=options.train_seconds,
        publish_seconds=options.publish_seconds,
        shared=options.shared,
        batches=options.batches,
        warmup=min(5, options.batches - 1),
        seed=options.seed,
    )


def _of_all(sources: Sequence[TaskSource], measured: Measured) -> tuple[TaskSource, ...]:
    """One for each environment of which something is known, an older run's own rules being unknown."""
    known = {source.environment: source for source in sources}
    return tuple(known.get(name) or TaskSource(environment=name) for name in measured.workloads)


def what_happened(path: Path) -> dict[str, Any]:
    """The figures of a run that a simulation predicts, the first steps left out."""
    run = RunDirectory.open(path)
    speed, metrics = run.read("speed"), run.read("metrics")
    ages = [line["mean_staleness"] for line in metrics if line["trained_tokens"]]
    later = speed[min(5, len(speed) - 1) :]
    seconds = sum(line["seconds"] for line in later)

    def mean(name: str) -> float:
        return sum(line[name] * line["seconds"] for line in later) / seconds

    return {
        "mode": run.description["config"]["scheduler"]["mode"],
        "steps_per_hour": 3600 * len(later) / seconds,
        "trainer_idle": mean("trainer_idle"),
        "sampler_idle": mean("sampler_idle"),
        "staleness": sum(ages) / max(len(ages), 1),
    }
