"""New weights on their way: from the learner to the engines of its run, and to others who follow it in a directory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from torch import Tensor

from glm5.rl.fleet import Fleet
from glm5.rl.meter import BusyTime
from glm5.rl.records import Ticket
from glm5.rl.session import Session
from glm5.rl.weights.mirror import Mirror

GLANCE = 0.2
"""Seconds between two looks at the clock and at Ctrl-C."""


class Outgoing:
    """Of one run. stopped: whether Ctrl-C came; engines are waited for no longer than until then, for they may take
    long: the run that goes on publishes again."""

    def __init__(self, session: Session, fleet: Fleet, mirror: Mirror | None, stopped: Callable[[], bool]) -> None:
        self.session, self.fleet, self.mirror, self.stopped = session, fleet, mirror, stopped
        self._unpublished: tuple[int, dict[str, Tensor]] | None = None
        """Weights that the engines may not take yet."""
        self.publishing = BusyTime()

    async def start(self) -> bool:
        """Brings up the engines, with the newest weights; False after Ctrl-C."""
        session = self.session
        begun = await self._awaited(self.fleet.start())
        if begun and self.fleet.version < session.version:  # the engines began with the run's first weights
            begun = await self._awaited(self.fleet.publish(session.version, session.learner.weights()))
        if begun and session.scheduler.version < session.version:
            session.published(session.version)
        if begun:
            await self.mirrored()
        return begun

    async def made(self) -> list[Ticket]:
        """The learner has made a version; gives the rollouts that are called off therefore."""
        session = self.session
        await self.mirrored()
        self._unpublished = (session.version, session.learner.weights())
        if session.version >= session.config.steps:
            return []
        cancelled = await self.publish()
        if self._unpublished is not None:  # the next step changes the tensors
            self._unpublished = (session.version, {n: t.detach().clone() for n, t in self._unpublished[1].items()})
        return cancelled

    async def publish(self) -> list[Ticket]:
        """Gives the engines the newest weights where they may take them, in sync and one-step-off mode only between two
        samplings; gives the rollouts that are called off therefore."""
        session = self.session
        if self._unpublished is None or not session.scheduler.swappable or self.stopped():
            return []
        version, weights = self._unpublished
        due = version - session.scheduler.version >= session.config.scheduler.publish_every
        if not due:
            return []
        self.publishing.begin()
        try:
            if not await self._awaited(self.fleet.publish(version, weights)):
                return []
        finally:
            self.publishing.end()
        self._unpublished = None
        return session.published(version)

    async def mirrored(self, *, last: bool = False) -> None:
        """The newest version where others find it, as a plain model."""
        version, mirror = self.session.version, self.mirror
        if mirror is not None and version and mirror.wants(version, last=last or version == self.session.config.steps):
            await mirror.write(version, self.session.learner.whole_model().state_dict())

    async def hand_over(self) -> None:
        """Leaves the last weights to engines that outlive the run."""
        over = self.fleet.hand_over(self.session.version, self.session.learner.weights())
        await (over if self.stopped() else self._awaited(over))  # a Ctrl-C of before meant the run, which is done

    async def _awaited(self, engines: Coroutine[Any, Any, None]) -> bool:
        """Waits for the engines; False after Ctrl-C."""
        waiting = asyncio.create_task(engines)
        while not (await asyncio.wait([waiting], timeout=GLANCE))[0]:
            if self.stopped():
                waiting.cancel()
                return False
        await waiting
        return True
