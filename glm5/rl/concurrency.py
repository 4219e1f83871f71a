"""How many rollouts run at once: more while the trainer waits, fewer when the engines choke or finished work piles up.

Additive increase, multiplicative decrease (Chiu and Jain, 1989). A pure function of observed numbers, asked once per
batch; the scheduler journals each change (`Scheduler.limit`), so a resumed run goes on with the same limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm5.errors import ConfigError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.fleet.protocol import FleetStats
from glm5.train.checks import check_counts, check_numbers


@dataclass(frozen=True, kw_only=True)
class ConcurrencyConfig:
    """Bounds and steps."""

    least: int = 8
    most: int = 512
    increase: int = 8
    """Rollouts more, per batch."""
    decrease: float = 0.75
    """What is left of the limit when the engines are overloaded."""
    cache_full: float = 0.95
    """Share of the engines' cache in use that counts as overloaded."""
    waiting: float = 0.25
    """So does this share of the running rollouts waiting for a place in an engine."""
    idle: float = 0.05
    """Share of its time that the trainer may wait for a batch."""

    def __post_init__(self) -> None:
        check_counts(self, "least", "most", "increase")
        check_numbers(self, "decrease", "cache_full", above=0)
        check_numbers(self, "waiting", "idle")
        if self.most < self.least or not self.decrease < 1:
            raise ConfigError(
                f"least is {self.least}, most {self.most} and decrease {self.decrease}; it must be least <= most and "
                "decrease < 1."
            )


@dataclass(frozen=True, kw_only=True)
class Load:
    """What was observed since the last batch."""

    running: int
    """The most rollouts under way at once."""
    waiting: int = 0
    """Requests that wait for a place in an engine now."""
    cache_used: float = 0.0
    """Share of the fullest engine's cache."""
    preemptions: int = 0
    """Requests that an engine had to put back."""
    trainer_idle: float = 0.0
    """Share of the time in which the trainer waited for a batch."""
    ready: int = 0
    """Groups that wait for the trainer."""


def next_limit(config: ConcurrencyConfig, scheduler: SchedulerConfig, limit: int, load: Load) -> int:
    """Rollouts at once until the next batch.

    Overload wins: more requests would only wait in the engines and grow old. Otherwise the limit rises while
    the trainer waits and the limit is what binds (not the staleness bound or a ratio), and falls one step
    while finished groups for more than one batch wait, because they only age.
    """
    overloaded = (
        load.preemptions > 0
        or load.cache_used >= config.cache_full
        or load.waiting > config.waiting * max(1, load.running)
    )
    if overloaded:
        limit = int(limit * config.decrease)
    elif load.trainer_idle > config.idle:
        limit += config.increase if load.running >= limit else 0
    elif load.ready > scheduler.groups_per_batch:
        limit -= config.increase
    return max(config.least, min(config.most, limit))


def load_of(stats: FleetStats, preempted: int, speed: Mapping[str, Any]) -> tuple[int, Load]:
    """What the concurrency control sees; `preempted`: sequences put back before the last batch. Also gives the new one.

    speed: the line of the step. Engines that say nothing of themselves count as idle.
    """
    said = [state.engine for state in stats.engines if state.engine is not None]
    now = sum(engine.preemptions for engine in said)
    load = Load(
        running=speed["running"],
        waiting=sum(engine.waiting for engine in said),
        cache_used=max((engine.blocks_used / engine.blocks_total for engine in said), default=0.0),
        preemptions=max(0, now - preempted),
        trainer_idle=speed["trainer_idle"],
        ready=speed["queue"],
    )
    return now, load
