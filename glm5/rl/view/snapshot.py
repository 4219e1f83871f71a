"""What a live view shows: one immutable value, made from the lines that a run writes into `metrics` and `speed`.

snapshot = Snapshot(name="arithmetic", steps=200)
snapshot = snapshot.after(metrics, speed)               # one step later
snapshot = replace(snapshot, running=12, queue=3)       # between two steps
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from glm5.rl.fleet import EngineState
from glm5.rl.retention import PREFIX

RECENT, RECENT_REWARDS = 10, 5
"""Steps over which the histogram is taken, and a mean reward."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one moment."""

    name: str
    mode: str = ""
    steps: int
    """Of the whole run."""
    step: int = 0
    """Steps that were taken."""
    seconds: float = 0.0
    """Of those steps, since the view began."""
    seen: int = 0
    """Steps whose seconds are known: not those that were learnt from again."""
    rewards: tuple[float, ...] = ()
    """Of each step."""
    by_environment: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Of the last steps that had some, by environment."""
    tokens_per_second: float = 0.0
    trainer_idle: float | None = None
    sampler_idle: float | None = None
    """Shares of the time of the last step: the bubble on both sides."""
    running: int = 0
    """Rollouts that are played now."""
    queue: int = 0
    """Groups that wait to be learnt from."""
    groups_per_batch: int | None = None
    staleness_bound: int | None = None
    mismatch: float | None = None
    """Mean |trainer - sampler|, nats."""
    entropy: float | None = None
    """Mean -log p of the sampled tokens, nats."""
    trained: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    requeued: Mapping[str, int] = field(default_factory=dict)
    """Samples, by reason; with `trained`, since the view began."""
    ages: tuple[Mapping[int, int], ...] = ()
    """Of the last steps: tokens by the versions between the weights that sampled them and those that learnt."""
    held: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """What is measured on the way and never learnt from, by name: the first value and the newest."""
    engines: tuple[EngineState, ...] = ()
    note: str = ""
    """What a person should know now."""

    def after(self, metrics: Mapping[str, Any], speed: Mapping[str, Any]) -> Snapshot:
        """One step later. Keys that are missing leave what was known."""
        held = {
            name: (self.held.get(name, (value,))[0], value)
            for key, value in metrics.items()
            if (name := key.removeprefix(PREFIX)) != key
        }
        scored = {
            name: (*self.by_environment.get(name, ()), value)[-RECENT_REWARDS:]
            for name, value in metrics.get("rewards", {}).items()
        }
        ages = {int(age): count for age, count in metrics.get("staleness", {}).items()}
        return replace(
            self,
            step=int(metrics["step"]) + 1,
            seen=self.seen + ("seconds" in speed),
            seconds=self.seconds + speed.get("seconds", 0.0),
            rewards=self.rewards if metrics["reward"] is None else (*self.rewards, float(metrics["reward"])),
            by_environment={**self.by_environment, **scored},
            tokens_per_second=speed.get("tokens_per_second", self.tokens_per_second),
            trainer_idle=speed.get("trainer_idle", self.trainer_idle),
            sampler_idle=speed.get("sampler_idle", self.sampler_idle),
            running=speed.get("running", self.running),
            queue=speed.get("queue", self.queue),
            mismatch=metrics.get("mismatch", self.mismatch),
            entropy=self.entropy if metrics.get("surprise") is None else metrics["surprise"],
            trained=self.trained + metrics.get("trained", 0),
            dropped=_sum(self.dropped, metrics.get("dropped", {})),
            requeued=_sum(self.requeued, metrics.get("requeued_because", {})),
            ages=(*self.ages, ages)[-RECENT:],
            held={**self.held, **held},
        )

    @property
    def staleness(self) -> dict[int, int]:
        """The histogram of the last steps."""
        total: Counter[int] = Counter()
        for ages in self.ages:
            total.update(ages)
        return dict(sorted(total.items()))

    @property
    def left(self) -> float | None:
        """Seconds to the end at the pace so far."""
        return self.seconds / self.seen * (self.steps - self.step) if self.seen and self.seconds else None


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return dict(Counter(one) + Counter(other))
