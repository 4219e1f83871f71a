"""What is simulated, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from glm5.errors import InputError
from glm5.rl.admission import Mode, SchedulerConfig
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.simulation.measured import Measured
from glm5.rl.simulation.workload import AssumedWorkload, EngineSpeed, Workload
from glm5.rl.tasks import TaskSource
from glm5.train.checks import check_counts, check_numbers


class NothingTeaches(InputError):
    """So many simulated groups in a row were dropped that there may never be a batch."""


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """A run that is not made."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sources: tuple[TaskSource, ...] = (TaskSource(environment="tasks"),)
    workloads: Mapping[str, Workload] = field(default_factory=lambda: {"tasks": AssumedWorkload()})
    """By environment."""
    engine: EngineSpeed = field(default_factory=EngineSpeed)
    train_seconds: float = 5.0
    """Of a learning step, without its tokens."""
    train_seconds_per_token: float = 0.0
    publish_seconds: float = 1.0
    """From trained to held by the engines; the trainer waits."""
    swap_seconds: float = 0.0
    """Of these, the last ones, in which the engines stand still."""
    shared: float = 1.0
    """Speed of trainer and engines while both work: 1 on devices of their own, 0.5 when they share one."""
    concurrency: ConcurrencyConfig | None = None
    """None: the limit stays as the scheduler's settings say."""
    batches: int = 50
    warmup: int = 5
    """Of the batches, those at the start that the statistics leave out."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "batches")
        check_counts(self, "warmup", "seed", least=0)
        check_numbers(self, "train_seconds", "train_seconds_per_token", "publish_seconds", "swap_seconds")
        check_numbers(self, "shared", above=0)
        if self.warmup >= self.batches or self.swap_seconds > self.publish_seconds or self.shared > 1:
            raise InputError("warmup must be below batches, swap_seconds at most publish_seconds and shared at most 1.")
        for source in self.sources:
            if source.environment not in self.workloads:
                raise InputError(f"There is no workload for the environment {source.environment}.")

    def as_measured(self, measured: Measured, **changes: Any) -> SimulationConfig:
        """With workloads, speeds and times of a real run, as far as they are known, but for `changes`.

        Its environments keep the sources they have here, and its engines their number and places.
        """
        known = {source.environment: source for source in self.sources}
        publish = self.publish_seconds if measured.publish_seconds is None else measured.publish_seconds
        values = {
            "sources": tuple(known.get(name) or TaskSource(environment=name) for name in measured.workloads),
            "workloads": measured.workloads,
            "engine": replace(self.engine, points=measured.points or self.engine.points),
            "train_seconds": measured.train_seconds,
            "train_seconds_per_token": measured.train_seconds_per_token,
            "publish_seconds": publish,
            "swap_seconds": min(self.swap_seconds, publish),
        }
        return replace(self, **{**values, **changes})


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What came of it. Shares and rates leave the warm-up out."""

    mode: Mode
    max_staleness: int
    max_running: int
    """At the end, when it was adapted."""
    seconds: float
    """Of the batches after the warm-up."""
    steps_per_hour: float
    rollouts_per_second: float
    """Learnt from."""
    tokens_per_second: float
    """Learnt from."""
    sampled_tokens_per_second: float
    trainer_idle: float
    """Share of the time in which the trainer waited for a batch (publishing counts as work)."""
    sampler_idle: float
    """Share of the time in which the engines had nothing to do or stood still for new weights."""
    sampler_use: float
    """Tokens made, relative to the most that the engines could have made."""
    beyond: float
    """Share of the tokens that were made by more sequences at once, by half, than the engine's speed is known of."""
    wasted: float
    """Share of the sampled tokens that were not learnt from, for whatever reason."""
    staleness: Mapping[int, int]
    """Rollouts that were learnt from, by the versions between their oldest token and the weights."""
    accounts: Mapping[str, Any]
    """Of the whole run."""
    timeline: tuple[tuple[float, int, int], ...]
    """(seconds, rollouts under way, groups ready) when each batch was made, warm-up included."""

    @property
    def mean_staleness(self) -> float:
        """Versions."""
        return sum(age * n for age, n in self.staleness.items()) / max(1, sum(self.staleness.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        staleness = {str(age): n for age, n in sorted(self.staleness.items())}
        return values | {"staleness": staleness, "mean_staleness": self.mean_staleness,
                         "timeline": [list(point) for point in self.timeline]}  # fmt: skip
