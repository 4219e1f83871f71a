"""`glm5 rl --simulate`: throughput, idle shares and staleness of a run that is not made.

glm5 rl --simulate --tokens.median 400 --tokens.p99 6000 --tool-seconds.median 2 --tool-seconds.p99 30
glm5 rl --simulate --like runs/rl --bounds 1 2 4 8         # lengths, latencies and speeds of a run that was made
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from glm5.rl.admission import SchedulerConfig
from glm5.rl.simulation import (
    AssumedWorkload,
    EngineSpeed,
    LongTail,
    Measured,
    SimulationConfig,
    comparison,
    records_of,
    sweep,
    write_page,
)
from glm5.train import RunDirectory


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Predict a run in virtual time, with the scheduler of real runs: sync, one-step-off and async side by side."""

    simulate: bool = True
    """Predict a run instead of making one."""
    like: Path | None = None
    """Take lengths, latencies, success and speeds from this run instead of the assumptions below."""
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
    seed: int = 0
    """Of lengths, latencies and rewards."""
    out: Path | None = None
    """Write a page with charts."""
    json: bool = False
    """Print one JSON object."""


def run(arguments: Sequence[str]) -> int:
    """Simulates and prints the comparison."""
    options = tyro.cli(SimulateOptions, prog="glm5 rl", args=list(arguments))
    config = SimulationConfig(
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
    made: dict[str, Any] | None = None
    if options.like is not None:
        config = config.as_measured(Measured.from_records(records_of(options.like)))
        made = what_happened(options.like)
    found = sweep(config, max_staleness=options.bounds, max_running=options.concurrency)
    if options.out is not None:
        write_page(found, options.out)
    if options.json:
        print(json.dumps({"simulations": [it.to_dict() for it in found], "run": made}))
        return 0
    print(comparison(found))
    if made is not None:
        print(
            f"\n{options.like} itself: {made['mode']}, {made['steps_per_hour']:.0f} steps/h, trainer idle "
            f"{made['trainer_idle']:.0%}, sampler idle {made['sampler_idle']:.0%}, staleness {made['staleness']:.2f}"
        )
    if options.out is not None:
        Console().print(f"page: {options.out}", soft_wrap=True)
    return 0


def what_happened(path: Path) -> dict[str, Any]:
    """The figures of a run that a simulation predicts, the first steps left out."""
    run = RunDirectory.open(path)
    speed, metrics = run.read("speed"), run.read("metrics")
    later = speed[min(5, len(speed) - 1) :]
    seconds = sum(line["seconds"] for line in later)

    def mean(name: str) -> float:
        return sum(line[name] * line["seconds"] for line in later) / seconds

    return {
        "mode": run.description["config"]["scheduler"]["mode"],
        "steps_per_hour": 3600 * len(later) / seconds,
        "trainer_idle": mean("trainer_idle"),
        "sampler_idle": mean("sampler_idle"),
        "staleness": sum(line["mean_staleness"] for line in metrics) / len(metrics),
    }
