"""How far a prediction may be off: it is made again with other random numbers, from a record that is drawn anew.

The bootstrap (Efron 1979): a record of as many groups and learning steps, drawn with replacement from the one that
there is, stands for another run of the same length. What a short record has never seen, such as the longest answers
of a long tail, no drawing brings back: hence `LEAST_ROLLOUTS`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from glm5.errors import InputError
from glm5.rl.simulation.config import NothingTeaches, SimulationConfig
from glm5.rl.simulation.machine import sweep
from glm5.rl.simulation.measured import Measured, NothingFinished

LEAST_ROLLOUTS = 128
"""Of a record that is long enough: with fewer, one prediction in ten is off by a quarter and more, with as many by a
sixth (`python -m benchmarks.rl_short_records`; lengths with a median of 200 tokens and a 99th percentile of 2,000)."""
LEAST_STEPS = 8
"""The first five are the beginning, with empty queues and cold caches; a few must follow them."""

MOST_TRIES = 4
"""For each draw that is asked for: so many are made at most where some hold nothing to learn from."""


@dataclass(frozen=True, slots=True)
class Spreads:
    """How far the predictions of a `sweep` may be off."""

    steps_per_hour: tuple[float, ...]
    """Standard deviation, for each simulation."""
    left_out: int
    """Draws in which no group teaches, so that no run comes of them: the true spread is larger than said."""


def spread_of(
    config: SimulationConfig,
    records: Sequence[Mapping[str, Any]] | None,
    *,
    draws: int,
    max_staleness: Sequence[int] = (),
    max_running: Sequence[int] = (),
    given: Mapping[str, Any] | None = None,
) -> Spreads:
    """That of the steps per hour of each simulation of such a `sweep`, over so many draws (at least 2).

    records: those that `config` is measured by; None: lengths and speeds are assumed, and only chance is drawn anew.
    given: settings that do not follow from the records (the `changes` of `as_measured`).
    A draw that teaches nothing is left out and made again. Raises InputError when that leaves fewer than two.
    """
    found: list[list[float]] = []
    tried = 0
    while len(found) < draws and tried < MOST_TRIES * draws:
        tried += 1
        again = replace(config, seed=config.seed + tried)
        try:
            if records is not None:
                measured = Measured.from_records(redrawn(records, Random(again.seed)))
                again = again.as_measured(measured, **(given or {}))
            simulations = sweep(again, max_staleness=max_staleness, max_running=max_running)
        except (NothingTeaches, NothingFinished):
            continue
        found.append([it.steps_per_hour for it in simulations])
    if len(found) < 2:
        raise InputError(
            f"In {tried - len(found)} of {tried} draws of the record no group teaches anything, so the spread cannot "
            "be told; take a longer record, or no draws (--draws 0)."
        )
    return Spreads(tuple(map(statistics.stdev, zip(*found, strict=True))), tried - len(found))


def redrawn(records: Sequence[Mapping[str, Any]], chance: Random) -> list[Mapping[str, Any]]:
    """As many of each kind, with replacement; rollouts in whole groups of the same environment: they hang together."""
    units: defaultdict[tuple[str, ...], dict[Any, list[Mapping[str, Any]]]] = defaultdict(dict)
    for number, record in enumerate(records):
        rollout = record["kind"] == "rollout"
        place = (record["kind"], record["environment"]) if rollout else (record["kind"],)
        units[place].setdefault(record["group"] if rollout else number, []).append(record)
    found: list[Mapping[str, Any]] = []
    for by_name in units.values():
        there = list(by_name.values())
        for number in range(len(there)):
            drawn = chance.choice(there)
            found += [{**record, "group": f"{number}"} if "group" in record else record for record in drawn]
    return found


def shortness(records: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence for a record that is too short to predict from."""
    steps = sum(record["kind"] == "train" for record in records)
    rollouts = sum(record["kind"] == "rollout" and record["outcome"] != "aborted" for record in records)
    if rollouts >= LEAST_ROLLOUTS and steps >= LEAST_STEPS:
        return None
    return (
        f"{steps} steps and {rollouts} rollouts are too short a record to predict from: the first five steps are not "
        f"like the rest, and with fewer than {LEAST_ROLLOUTS} rollouts one prediction in ten is off by a quarter and "
        f"more. Let the run make {LEAST_STEPS} steps and {LEAST_ROLLOUTS} rollouts first."
    )
