"""How long the record of a run must be for the simulator to predict from it: a run of known numbers, cut short.

    python -m benchmarks.rl_short_records                 # two minutes on one core; nothing is timed
    python -m benchmarks.rl_short_records --trials 40

A run in virtual time is known exactly: log-normal lengths, tasks of unequal difficulty, learning steps of unequal
length. Of its record only the first steps are given to the simulator, which predicts the steps per hour of the whole
(`Measured`, `as_measured`), with its spread (`spread_of`); and so again with other random numbers. The engine's speed
is given: a record has it at the concurrency of the run alone, which is no matter of its length.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import tyro

from glm5.rl.admission import SchedulerConfig
from glm5.rl.records import Ticket
from glm5.rl.simulation import AssumedWorkload, LongTail, Measured, SimulationConfig, simulate, spread_of
from glm5.rl.tasks import TaskSource


@dataclass
class Options:
    """Options of the benchmark."""

    steps: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Of the records."""
    groups: int = 2
    """Tasks of a learning step."""
    samples: int = 4
    """Rollouts of each."""
    trials: int = 20
    """Records of each length."""
    draws: int = 5
    """For the spread."""
    train_cv: float = 0.2
    """Standard deviation of the seconds of a learning step, as a share of their mean."""


TRUTH = AssumedWorkload(tokens=LongTail(200, 2000))
KEEP = TaskSource(environment="tasks", uniform_groups="keep")


def record(steps: int, config: SimulationConfig, options: Options, chance: Random) -> list[dict[str, Any]]:
    """Of a run of so many steps."""
    found: list[dict[str, Any]] = []
    for _ in range(steps):
        seconds = chance.gauss(config.train_seconds, options.train_cv * config.train_seconds)
        found.append({"kind": "train", "seconds": max(0.1, seconds), "tokens": 1})
        for index in range(config.scheduler.groups_per_batch):
            group = chance.random()
            for number in range(config.scheduler.group_size):
                play = TRUTH.play(Ticket("tasks", index, 0, number), Random(group), Random(chance.random()))
                found.append({
                    "kind": "rollout", "environment": "tasks", "group": str(group), "turn_tokens": list(play.tokens),
                    "tool_seconds": 0.0, "outcome": play.outcome, "reward": play.reward,
                })  # fmt: skip
    return found


def main(options: Options) -> None:
    """Prints a table."""
    scheduler = SchedulerConfig(groups_per_batch=options.groups, group_size=options.samples)
    config = SimulationConfig(scheduler=scheduler, workloads={"tasks": TRUTH}, sources=(KEEP,), batches=30)
    known = statistics.fmean(simulate(replace(config, seed=1000 + n)).steps_per_hour for n in range(20))
    print("| steps of the record | rollouts | off by, median | 9 of 10 | at most | spread said | within 2 spreads |")
    print("|---|---|---|---|---|---|---|")
    for steps in options.steps:
        errors, spreads = [], []
        for trial in range(options.trials):
            records = record(steps, config, options, Random(f"{steps}/{trial}"))
            measured = replace(config, seed=trial).as_measured(
                Measured.from_records(records), engine=config.engine, publish_seconds=config.publish_seconds
            )
            errors.append(abs(simulate(measured).steps_per_hour / known - 1))
            spreads.append(async_spread(measured, records, options.draws) / known)
        errors_by_size = sorted(errors)
        ninth = errors_by_size[int(0.9 * len(errors))]
        within = statistics.fmean(e <= 2 * s for e, s in zip(errors, spreads, strict=True))
        rollouts = steps * options.groups * options.samples
        print(f"| {steps} | {rollouts} | {statistics.median(errors):.0%} | {ninth:.0%} | {errors_by_size[-1]:.0%} | "
              f"{statistics.median(spreads):.0%} | {within:.0%} |", flush=True)  # fmt: skip


def async_spread(config: SimulationConfig, records: list[dict[str, Any]], draws: int) -> float:
    """Of the steps per hour in the mode of the run."""
    return spread_of(config, records, draws=draws, max_staleness=(config.scheduler.max_staleness,)).steps_per_hour[-1]


if __name__ == "__main__":
    main(tyro.cli(Options))
