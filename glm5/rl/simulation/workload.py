"""What a run has to do, for the simulator: how long answers and tools take, what fails. Assumed, or measured."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from glm5.errors import InputError
from glm5.rl.records import Outcome, Rollout
from glm5.train.checks import check_counts, check_numbers

NORMAL_99 = 2.326347874040841
"""The 99th percentile of a standard normal variable."""


@dataclass(frozen=True, slots=True)
class LongTail:
    """Log-normal: half of the draws are below `median`, one in a hundred above `p99`. Equal: no spread."""

    median: float
    """Half are below it."""
    p99: float
    """One in a hundred is above it."""

    def __post_init__(self) -> None:
        if not 0 <= self.median <= self.p99 or (self.median == 0 < self.p99):
            raise InputError(f"A long tail needs 0 < median <= p99, not {self.median} and {self.p99}.")

    def draw(self, chance: Random) -> float:
        """One value."""
        if self.median == self.p99:
            return self.median
        return self.median * math.exp(chance.gauss(0.0, math.log(self.p99 / self.median) / NORMAL_99))


@dataclass(frozen=True, slots=True)
class Play:
    """One rollout as the simulator plays it: in turn, the engine makes tokens and the environment answers."""

    tokens: tuple[int, ...]
    """Of each turn."""
    tool_seconds: tuple[float, ...]
    """After each turn."""
    outcome: Outcome
    reward: float


class Workload(Protocol):
    """Where plays come from."""

    def play(self, group: Random, sample: Random, number: int) -> Play:
        """Sample `number` of a task; `group` gives the same numbers to all samples of it."""


@dataclass(frozen=True, kw_only=True)
class AssumedWorkload:
    """Rollouts drawn from distributions."""

    tokens: LongTail = LongTail(200, 2000)
    """Sampled per turn."""
    turns: int = 1
    tool_seconds: LongTail = LongTail(0, 0)
    """In the environment, after each turn."""
    failing: float = 0.0
    """Share of rollouts whose environment fails."""
    success: float = 0.5
    """Mean share of rollouts that are rewarded 1 rather than 0."""
    spread: float = 0.3
    """How different the tasks are, from 0 (each as hard as the next) towards 1 (each is solved always or never)."""

    def __post_init__(self) -> None:
        check_counts(self, "turns")
        check_numbers(self, "failing", "success", "spread")
        if max(self.failing, self.success, self.spread) > 1 or self.spread == 1:
            raise InputError("failing, success and spread are shares; they must be below 1.")

    def play(self, group: Random, sample: Random, number: int) -> Play:
        """Task difficulty is Beta-distributed; tokens of turns and seconds of tools are drawn one by one."""
        ease = self.success
        if self.spread and 0 < self.success < 1:
            strength = 1 / self.spread - 1
            ease = group.betavariate(self.success * strength, (1 - self.success) * strength)
        tokens = tuple(max(1, round(self.tokens.draw(sample))) for _ in range(self.turns))
        tools = tuple(self.tool_seconds.draw(sample) for _ in range(self.turns))
        outcome: Outcome = "env_failure" if sample.random() < self.failing else "ok"
        return Play(tokens, tools, outcome, float(sample.random() < ease))


@dataclass(frozen=True)
class MeasuredWorkload:
    """Groups of a real run, drawn again as a whole, so that what belongs together in a rollout (length, tools, reward)
    and in a group (difficulty) stays together."""

    groups: tuple[tuple[Play, ...], ...]

    def play(self, group: Random, sample: Random, number: int) -> Play:
        """One that happened; the samples of a group are different ones as long as there are enough."""
        plays = group.choice(self.groups)
        return group.sample(plays, len(plays))[number % len(plays)]


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """Tokens per second of one engine, by the number of sequences that it makes at once."""

    points: tuple[tuple[int, float], ...] = ((1, 50.0), (8, 300.0), (32, 900.0), (128, 2000.0))
    """(sequences, tokens per second of all together), rising; straight lines between, from (0, 0), flat behind."""
    engines: int = 1
    """Engines of this speed."""
    places: int = 256
    """Sequences at once in each engine; the others wait."""

    def __post_init__(self) -> None:
        check_counts(self, "engines", "places")
        numbers = [n for n, _ in self.points]
        if not numbers or numbers != sorted(set(numbers)) or min(numbers) < 1 or min(s for _, s in self.points) <= 0:
            raise InputError(f"The points of an engine's speed must rise from 1 sequence on; got {self.points}.")

    def tokens_per_second(self, sequences: float) -> float:
        """Of one engine."""
        before = (0.0, 0.0)
        for point in self.points:
            if sequences <= point[0]:
                share = (sequences - before[0]) / (point[0] - before[0])
                return before[1] + share * (point[1] - before[1])
            before = point
        return before[1]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The statistics of a real run, in the form in which the simulator takes them.

    `from_records` reads plain objects; `kind` says what each is, others are passed over:
        {"kind": "rollout", "environment": str, "group": str, "turn_tokens": [int], "turn_seconds": [float],
         "tool_seconds": float, "outcome": str, "reward": float | null}
        {"kind": "train", "seconds": float, "tokens": int}          # one learning step
        {"kind": "publish", "seconds": float}                       # from trained to held by the engines
        {"kind": "engine", "running": int, "tokens_per_second": float}      # a look at one engine that was busy
    """

    workloads: Mapping[str, MeasuredWorkload]
    """By environment."""
    engine: EngineSpeed | None
    """None when the records say nothing of the engine."""
    train_seconds: float
    """Of a step, without its tokens (least squares; all of it when the steps do not tell the two apart)."""
    train_seconds_per_token: float
    publish_seconds: float
    counts: Mapping[str, int] = field(default_factory=dict)
    """Records of each kind."""

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], *, engines: int = 1, places: int = 256) -> Measured:
        """Raises InputError when there is no rollout or no learning step among them."""
        found: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for record in records:
            found[record["kind"]].append(record)
        for kind in ("rollout", "train"):
            if not found[kind]:
                raise InputError(f"The records hold no {kind}; a run of at least one step is needed.")
        fixed, per_token = _line([(r["tokens"], r["seconds"]) for r in found["train"]])
        return cls(
            workloads=_workloads(found["rollout"]),
            engine=_speed(found["engine"], engines, places),
            train_seconds=fixed,
            train_seconds_per_token=per_token,
            publish_seconds=statistics.fmean([r["seconds"] for r in found["publish"]] or [0.0]),
            counts={kind: len(rows) for kind, rows in found.items()},
        )


def rollout_record(rollout: Rollout) -> dict[str, Any]:
    """The record of a rollout that `Measured.from_records` reads."""
    return {
        "kind": "rollout",
        "environment": rollout.ticket.environment,
        "group": rollout.ticket.group.id,
        "turn_tokens": [len(turn.output_ids) for turn in rollout.turns] or [rollout.num_sampled],
        "turn_seconds": [turn.seconds for turn in rollout.turns],
        "tool_seconds": rollout.tool_seconds,
        "outcome": rollout.outcome,
        "reward": None if rollout.reward is None else rollout.reward.value,
    }


def _workloads(rows: Sequence[Mapping[str, Any]]) -> dict[str, MeasuredWorkload]:
    groups: defaultdict[str, defaultdict[str, list[Play]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["outcome"] == "aborted":  # called off in the middle: says nothing about how long it would have taken
            continue
        turns = max(1, len(row["turn_tokens"]))
        tokens = tuple(max(1, n) for n in row["turn_tokens"]) or (1,)
        play = Play(tokens, (row["tool_seconds"] / turns,) * turns, row["outcome"], row["reward"] or 0.0)
        groups[row["environment"]][row["group"]].append(play)
    return {name: MeasuredWorkload(tuple(map(tuple, by_group.values()))) for name, by_group in groups.items()}


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares (at 0, slope), neither below 0; the mean and 0 when the points do not say."""
    xs, ys = zip(*points, strict=True)
    if len(set(xs)) < 2:
        return statistics.fmean(ys), 0.0
    slope, start = statistics.linear_regression(xs, ys)
    if slope <= 0:
        return statistics.fmean(ys), 0.0
    return (start, slope) if start >= 0 else (0.0, sum(ys) / sum(xs))


def _speed(rows: Sequence[Mapping[str, Any]], engines: int, places: int) -> EngineSpeed | None:
    by_running: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["running"] > 0 and row["tokens_per_second"] > 0:
            by_running[row["running"]].append(row["tokens_per_second"])
    points = tuple((n, statistics.median(speeds)) for n, speeds in sorted(by_running.items()))
    return EngineSpeed(points=points, engines=engines, places=places) if points else None
