"""The statistics of a real run, in the form in which the simulator takes them.

Rollouts that were called off, or were under way when the run ended, are mostly long ones: without them answers would be
predicted too short. Of each is known that it has at least so many tokens, so one that got further stands for the rest
of it (the redistribution to the right of the Kaplan-Meier estimate: Efron, 1967).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from glm5.errors import InputError
from glm5.rl.records import SCORED, Rollout
from glm5.rl.simulation.workload import MeasuredWorkload, Play

Record = Mapping[str, Any]


class NothingFinished(InputError):
    """Records without a rollout that came to its end, or without a learning step."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the simulator can know of a run.

    `from_records` reads plain objects; `kind` says what each is, others are passed over:
        {"kind": "rollout", "environment": str, "group": str, "turn_tokens": [int], "turn_seconds": [float],
         "tool_seconds": float, "outcome": str, "reward": float | null}     # aborted: with its tokens until then
        {"kind": "train", "seconds": float, "tokens": int}          # a learning step; without tokens: of nothing
        {"kind": "publish", "seconds": float}                       # from trained to held by the engines
        {"kind": "engine", "running": int, "tokens_per_second": float}      # a look at one engine that was busy
        {"kind": "sampled", "tokens": int, "seconds": float, "turn_tokens": int, "turn_seconds": float}
            # where nobody looked: what engines made in so many seconds of one engine, and turns that ended meanwhile
    """

    workloads: Mapping[str, MeasuredWorkload]
    """By environment."""
    points: tuple[tuple[int, float], ...] | None
    """Of `EngineSpeed`; None when the records say nothing of the engine."""
    train_seconds: float
    """Of a step, without its tokens (least squares; all of it when the steps do not tell the two apart)."""
    train_seconds_per_token: float
    publish_seconds: float | None
    """None when the records say nothing of it."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Records of each kind."""

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> Measured:
        """Raises NothingFinished when there is no finished rollout or no step that learnt among them.

        Steps without tokens cost nothing, in the simulator as in a run, and say nothing of those that learn: as points
        of the line they would draw its start towards 0 and make every token dearer.
        """
        found: defaultdict[str, list[Record]] = defaultdict(list)
        for record in records:
            found[record["kind"]].append(record)
        workloads = _workloads(found["rollout"])
        steps = [(record["tokens"], record["seconds"]) for record in found["train"] if record["tokens"]]
        for kind, some in (("finished rollout", workloads), ("step that learnt from tokens", steps)):
            if not some:
                raise NothingFinished(f"The records hold no {kind}; give those of a run that has learnt.")
        fixed, per_token = _line(steps)
        published = [record["seconds"] for record in found["publish"]]
        return cls(
            workloads=workloads,
            points=_looks(found["engine"]) or _whole(found["sampled"]),
            train_seconds=fixed,
            train_seconds_per_token=per_token,
            publish_seconds=statistics.fmean(published) if published else None,
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


def _workloads(rows: Sequence[Record]) -> dict[str, MeasuredWorkload]:
    by_environment: defaultdict[str, list[Record]] = defaultdict(list)
    for row in rows:
        by_environment[row["environment"]].append(row)
    found = {}
    for name, some in by_environment.items():
        if any(row["outcome"] != "aborted" for row in some):
            groups: defaultdict[str, list[Play]] = defaultdict(list)
            for row, play in zip(some, _completed(some, Random(0)), strict=True):
                groups[row["group"]].append(play)
            found[name] = MeasuredWorkload(tuple(map(tuple, groups.values())))
    return found


def _completed(rows: Sequence[Record], chance: Random) -> list[Play]:
    """The plays of an environment, in the order of the rows, each to its end."""
    plays = [_play(row) for row in rows]
    finished: defaultdict[str, list[Play]] = defaultdict(list)
    for row, play in zip(rows, plays, strict=True):
        if row["outcome"] in SCORED:
            finished[row["group"]].append(play)
    open = [row["outcome"] == "aborted" for row in rows]
    order = sorted(range(len(rows)), key=lambda n: (sum(plays[n].tokens), not open[n]))
    for place in reversed(range(len(order))):  # the longest first: what an open one takes over has an end
        n, others = order[place], len(order) - place - 1
        if not open[n]:
            continue
        further = plays[order[place + 1 + chance.randrange(others)]] if others else replace(plays[n], outcome="ok")
        own = finished[rows[n]["group"]] if further.outcome in SCORED else []
        plays[n] = replace(further, reward=chance.choice([further, *own]).reward)
    return plays


def _play(row: Record) -> Play:
    turns = max(1, len(row["turn_tokens"]))
    tokens = tuple(max(1, n) for n in row["turn_tokens"]) or (1,)
    return Play(tokens, (row["tool_seconds"] / turns,) * turns, row["outcome"], row["reward"] or 0.0)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares (at 0, slope), neither below 0; the mean and 0 when the points do not say."""
    xs, ys = zip(*points, strict=True)
    if len(set(xs)) < 2:
        return statistics.fmean(ys), 0.0
    slope, start = statistics.linear_regression(xs, ys)
    if slope <= 0:
        return statistics.fmean(ys), 0.0
    return (start, slope) if start >= 0 else (0.0, sum(ys) / sum(xs))


def _looks(rows: Sequence[Record]) -> tuple[tuple[int, float], ...] | None:
    """The median at each number of sequences."""
    by_running: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["running"] > 0 and row["tokens_per_second"] > 0:
            by_running[row["running"]].append(row["tokens_per_second"])
    return tuple((n, statistics.median(speeds)) for n, speeds in sorted(by_running.items())) or None


def _whole(rows: Sequence[Record]) -> tuple[tuple[int, float], ...] | None:
    """One point of all together: of single steps, a turn would count whole where it ended."""
    tokens, seconds, of_turns, waited = (
        sum(row[name] for row in rows) for name in ("tokens", "seconds", "turn_tokens", "turn_seconds")
    )
    if not (tokens and seconds and of_turns and waited):
        return None
    of_one = of_turns / waited
    sequences = max(1, round(tokens / seconds / of_one))
    return ((sequences, sequences * of_one),)
