"""A run in which nothing moves says what it waits for, and stops.

An outage that is borne (`rollout.outage_seconds`: an environment's server is asked again, no engine is there, or none
that may take what waits) comes on top of the patience, so neither cuts the other short, whichever is larger. It ends by
itself: the environment fails, or the fleet gives its engines up.

Nor does time count in which nobody looked: this program was stopped (Ctrl-Z, a debugger), or waited for engines to
start, for new weights or for a checkpoint.
"""

from __future__ import annotations

import time

from glm5.errors import RunError
from glm5.rl.config import RLRunConfig
from glm5.rl.fleet import FleetStats
from glm5.rl.meter import Meter

LONGEST_LOOK = 5.0
"""Seconds between two looks at most: longer than the busiest machine needs."""


class Patience:
    """How long nothing may move."""

    def __init__(self, config: RLRunConfig, meter: Meter) -> None:
        self.seconds, self.outage_seconds, self.meter = config.patience, config.rollout.outage_seconds, meter
        self._since = self._looked = meter.moved_at
        """When waiting began, moved on by what does not count; the last look."""

    def outlasted(self, stats: FleetStats) -> float | None:
        """Seconds since something moved, when they are too many. To be asked whenever nothing is heard."""
        if stats.waiting or (stats.engines and not any(engine.up for engine in stats.engines)):
            self.meter.somebody_away = True
        now, moved = time.monotonic(), self.meter.moved_at
        unseen = now - max(self._looked, moved)
        self._since = max(self._since, moved) + (unseen if unseen > LONGEST_LOOK else 0.0)
        self._looked, waited = now, now - self._since
        most = self.seconds + (self.outage_seconds if self.meter.somebody_away else 0.0)
        return waited if waited >= most else None

    def exhausted(self, waited: float, playing: int, stats: FleetStats) -> RunError:
        """What is waited for. playing: rollouts under way."""
        asking = self.meter.sampling.open
        states = ", ".join(
            f"engine {s.name} is {'up' if s.up else 'down'} at version {s.version}" for s in stats.engines
        )
        return RunError(
            f"Nothing has moved for {waited:.0f} s: {asking} rollouts wait for tokens, {playing - asking} are in their "
            f"environments, the learner is idle, {states}. Mend what hangs and resume the run, or give it more "
            "patience."
        )
