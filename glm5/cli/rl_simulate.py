"""`glm5 rl --simulate`: throughput, idle shares and staleness of a run that is not made.

glm5 rl --simulate --tokens.median 400 --tokens.p99 6000 --tool-seconds.median 2 --tool-seconds.p99 30
glm5 rl --simulate --like runs/rl --bounds 1 2 4 8         # lengths, latencies and speeds of a run that was made
glm5 rl --simulate --like runs/rl --engine.engines 4       # the same with other engines
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from glm5.errors import InputError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.gateway.session import ENVIRONMENT
from glm5.rl.simulation import (
    AssumedWorkload,
    EngineSpeed,
    LongTail,
    Measured,
    RunSettings,
    Simulation,
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
from glm5.train.recorded import plain

MEASURED = ("tokens", "turns", "tool-seconds", "success", "failing")
"""Flags of what a run's record knows better."""
GUESSED = 0.1
"""Share of the tokens made at a speed that is a guess, from which on it is said."""


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Predict a run in virtual time, with the scheduler of real runs: sync, one-step-off and async side by side."""

    simulate: bool = True
    """Predict a run instead of making one."""
    like: Path | None = None
    """Take lengths, latencies, success and failures from this run; speeds, the number of engines and the scheduler's
    settings too, but for those that are given, which are tried instead."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    bounds: tuple[int, ...] = (1, 2, 4, 8)
    """Staleness bounds of the asynchronous runs."""
    concurrency: tuple[int, ...] = ()
    """Rollouts at once, several to compare; when left out the scheduler's max_running, adapted as the run of --like
    adapts it."""
    tokens: LongTail = field(default_factory=lambda: LongTail(200, 2000))
    """Sampled per turn."""
    turns: int = 1
    """Of an episode."""
    tool_seconds: LongTail = field(default_factory=lambda: LongTail(0, 0))
    """Of the environment, after each turn."""
    success: float = 0.5
    """Mean share of rollouts that are rewarded, from 0 to 1: groups of equal rewards are not learnt from."""
    failing: float = 0.0
    """Share of rollouts whose environment fails."""
    engine: EngineSpeed = field(default_factory=EngineSpeed)
    train_seconds: float = 5.0
    """Of a learning step, without what its tokens take."""
    train_seconds_per_token: float = 0.0
    """Of a learning step, for each sampled token in it."""
    publish_seconds: float = 1.0
    """From trained to held by the engines."""
    shared: float = 1.0
    """Speed of trainer and engines while both work: 1 on devices of their own, 0.5 when they share one."""
    batches: int = 50
    """Learning steps that are simulated; the first five are not counted."""
    draws: int = 5
    """Times that everything is simulated again with other random numbers, and from a record of --like that is drawn
    anew, for the standard deviation of the steps per hour; 0: not, else at least 2."""
    seed: int = 0
    """Of lengths, latencies and rewards."""
    out: Path | None = None
    """Write a page with charts."""
    json: bool = False
    """Print one JSON object."""


def run(arguments: Sequence[str]) -> int:
    """Simulates and prints the comparison."""
    said = {name.replace("_", "-").removeprefix("--").split("=")[0] for name in arguments if name.startswith("--")}
    parse = functools.partial(tyro.cli, SimulateOptions, prog="glm5 rl", args=list(arguments))
    options, records, measured, given = parse(), None, None, dict[str, Any]()
    if options.like is not None:
        told = settings_of(options.like)
        engine = replace(EngineSpeed(), engines=told.engines)
        like = replace(SimulateOptions(), scheduler=told.scheduler, engine=engine, publish_seconds=0.0)
        options = parse(default=like)
        records = list(records_of(options.like))
        measured = Measured.from_records(records)
        given = given_of(options, said)
        if "concurrency" not in said:
            given["concurrency"] = told.concurrency
        config = settings(options).as_measured(measured, sources=_of_all(told, measured), **given)
    else:
        config = settings(options)
    grid = {"max_staleness": options.bounds, "max_running": options.concurrency}
    found = sweep(config, **grid)
    spread = spread_of(config, records, draws=options.draws, given=given, **grid) if options.draws else Spreads((), 0)
    warned = list(warnings(config, found, spread.left_out))
    made = None
    if options.like is not None and records is not None and measured is not None:
        warned += of_the_record(options.like, config, records, measured, given)
        made = what_happened(options.like)
    if options.out is not None:
        write_page(found, options.out, spread.steps_per_hour)
    if options.json:
        simulations = [
            it.to_dict() | {"steps_per_hour_spread": s} for it, s in zip_longest(found, spread.steps_per_hour)
        ]
        print(json.dumps({"simulations": simulations, "run": made, "settings": assumed(config), "warnings": warned,
                          "draws_left_out": spread.left_out}))  # fmt: skip
        return 0
    print(comparison(found, spread.steps_per_hour))
    print(f"\n{told_of(config)}")
    if made is not None:
        print(
            f"{options.like} itself: {made['mode']}, {made['steps_per_hour']:.0f} steps/h, trainer idle "
            f"{made['trainer_idle']:.0%}, sampler idle {made['sampler_idle']:.0%}, staleness {made['staleness']:.2f}"
        )
    for warning in warned:
        print(f"Warning: {warning}", file=sys.stderr)
    if options.out is not None:
        Console().print(f"page: {options.out}", soft_wrap=True)
    return 0


def settings(options: SimulateOptions) -> SimulationConfig:
    """What is assumed, where nothing was measured. Raises InputError for bounds and draws that are none."""
    if min(options.bounds, default=0) < 0:
        raise InputError(f"--bounds has {min(options.bounds)}; a staleness bound is 0 or more versions.")
    if options.draws < 0 or options.draws == 1:
        raise InputError(f"--draws is {options.draws}; a deviation needs 2 or more, and 0 is for none.")
    workload = AssumedWorkload(tokens=options.tokens, turns=options.turns, tool_seconds=options.tool_seconds,
                               success=options.success, failing=options.failing)  # fmt: skip
    return SimulationConfig(
        scheduler=options.scheduler,
        workloads={"tasks": workload},
        engine=options.engine,
        train_seconds=options.train_seconds,
        train_seconds_per_token=options.train_seconds_per_token,
        publish_seconds=options.publish_seconds,
        shared=options.shared,
        batches=options.batches,
        warmup=min(5, options.batches - 1),
        seed=options.seed,
    )


def given_of(options: SimulateOptions, said: set[str]) -> dict[str, Any]:
    """What is tried in place of what a run's record says. Raises InputError for what only the record can say."""
    for name in MEASURED:
        if any(flag.split(".")[0] == name for flag in said):
            raise InputError(
                f"--{name} is measured by --like; leave it out, or leave out --like and assume everything."
            )
    given: dict[str, Any] = {}
    if "train-seconds" in said:
        given |= {"train_seconds": options.train_seconds, "train_seconds_per_token": 0.0}
    if "train-seconds-per-token" in said:
        given["train_seconds_per_token"] = options.train_seconds_per_token
    if "publish-seconds" in said:
        given["publish_seconds"] = options.publish_seconds
    if "engine.points" in said:
        given["engine"] = options.engine
    return given


def warnings(config: SimulationConfig, found: Sequence[Simulation], left_out: int) -> Iterator[str]:
    """Of any simulation."""
    guessed = max(found, key=lambda it: it.beyond)
    if guessed.beyond > GUESSED:
        most = config.engine.points[-1][0]
        yield (
            f"{guessed.beyond:.0%} of the tokens of {guessed.mode} (bound {guessed.max_staleness}, at most "
            f"{guessed.max_running} rollouts) are made by far more sequences at once than the {most} of an engine "
            "whose speed is known; it is taken to be no faster with more. Measure it there and give --engine.points."
        )
    if left_out:
        yield (f"{left_out} draws held nothing to learn from and are left out of the deviation, which is larger than "
               "said.")  # fmt: skip


def of_the_record(
    path: Path, config: SimulationConfig, records: Sequence[dict[str, Any]], measured: Measured, given: dict[str, Any]
) -> Iterator[str]:
    """What the record of a run leaves open."""
    if (short := shortness(records)) is not None:
        yield short
    if measured.points is None and "engine" not in given:
        yield f"{path} says nothing of the speed of its engines, so one is assumed; give it: --engine.points."
    if measured.publish_seconds is None and "publish_seconds" not in given:
        yield (f"{path} did not time its publications, {config.publish_seconds:g} s are assumed; give them: "
               "--publish-seconds.")  # fmt: skip
    largest = max(len(group) for workload in measured.workloads.values() for group in workload.groups)
    if config.scheduler.group_size > largest:
        yield (
            f"Groups of {config.scheduler.group_size} are simulated, but {path} had {largest} at most: their samples "
            "repeat, so more groups are uniform, and fewer wait for a long answer, than would be."
        )
    if RunDirectory.open(path).description["inputs"].get("environments") == ENVIRONMENT:
        yield f"{path} learns from agents: how many of them work at once, and how fast, no setting here decides."


def assumed(config: SimulationConfig) -> dict[str, Any]:
    """What was simulated, beside what is drawn."""
    names = ("scheduler", "engine", "train_seconds", "train_seconds_per_token", "publish_seconds", "shared",
             "concurrency", "batches", "warmup", "seed", "sources")  # fmt: skip
    return {name: plain(getattr(config, name)) for name in names}


def told_of(config: SimulationConfig) -> str:
    """The numbers that decide, for people."""
    points = ", ".join(f"{speed:.0f} with {n}" for n, speed in config.engine.points)
    step = f"{config.train_seconds:.3g} s"
    if config.train_seconds_per_token:
        step += f" and {1000 * config.train_seconds_per_token:.3g} ms a token"
    return (
        f"{config.engine.engines} engine{'s' if config.engine.engines > 1 else ''} of {points} sequences (tokens/s); a "
        f"learning step takes {step}, a publication {config.publish_seconds:.3g} s"
    )


def _of_all(told: RunSettings, measured: Measured) -> tuple[TaskSource, ...]:
    """One for each environment of which something is known, an older run's own rules being unknown."""
    known = {source.environment: source for source in told.sources}
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
