"""What a run has to do, for the simulator: how long answers and tools take, what fails; and how fast engines are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Protocol

from glm5.errors import InputError
from glm5.rl.records import Outcome, Ticket
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
        if not 0 <= self.median <= self.p99 < math.inf or (self.median == 0 < self.p99):
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

    def play(self, ticket: Ticket, group: Random, sample: Random) -> Play:
        """What is played for a ticket; `group` gives the same numbers to all samples of a task."""


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

    def play(self, ticket: Ticket, group: Random, sample: Random) -> Play:
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

    def play(self, ticket: Ticket, group: Random, sample: Random) -> Play:
        """One that happened; the samples of a group are different ones as long as there are enough."""
        plays = group.choice(self.groups)
        return group.sample(plays, len(plays))[ticket.sample % len(plays)]


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
        if not numbers or numbers != sorted(set(numbers)) or min(numbers) < 1:
            raise InputError(f"The points of an engine's speed must rise from 1 sequence on; got {self.points}.")
        if not all(0 < speed < math.inf for _, speed in self.points):
            raise InputError(f"The speeds of an engine are tokens per second, above 0; got {self.points}.")

    def tokens_per_second(self, sequences: float) -> float:
        """Of one engine."""
        before = (0.0, 0.0)
        for point in self.points:
            if sequences <= point[0]:
                share = (sequences - before[0]) / (point[0] - before[0])
                return before[1] + share * (point[1] - before[1])
            before = point
        return before[1]
