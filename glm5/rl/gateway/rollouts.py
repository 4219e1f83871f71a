"""Where the orchestrator's rollouts come from when outside agents make them: closed sessions fill its tickets.

The scheduler gives out tickets as for environments of its own; here a ticket waits until a complete group of sessions
is there for its group. So bound and sweep, repair, journal, resumption and all figures are those of any other run. A
group is given whole, and groups in the order in which they became complete.

A run that was killed finds in its journal which sessions it has had (`sessions_had`), and takes up a group where it was
torn, whether the files of its sessions are still there or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from glm5.envs import Episode, EpisodeLimits, Task
from glm5.envs.protocol import UniformGroups
from glm5.rl.event_log import events_of
from glm5.rl.events import Finished
from glm5.rl.gateway.reading import FinishedSessions, Ready
from glm5.rl.gateway.session import ENVIRONMENT
from glm5.rl.gateway.sessions import Sessions
from glm5.rl.journal import read_journal
from glm5.rl.records import Rollout, Ticket
from glm5.threads import in_thread

GLANCE = 0.1
"""Seconds between two looks at the directory."""


class GatewayRollouts:
    """`play` is the orchestrator's `Player`."""

    def __init__(self, finished: FinishedSessions, ready: Sequence[Ready] = ()) -> None:
        """ready: groups that were read from it already."""
        self.finished = finished
        self.sessions: Sessions | None = None
        """Those that this program serves."""
        self._wanted: dict[str, tuple[Ticket, asyncio.Future[Rollout]]] = {}
        self._ready = list(ready)
        self._watching: asyncio.Task[None] | None = None

    async def play(self, ticket: Ticket) -> Rollout:
        """The rollout of a ticket, when there are sessions for its group. Cancelling it gives the place up."""
        future = asyncio.get_running_loop().create_future()
        self._wanted[ticket.id] = (ticket, future)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        try:
            return await future
        finally:
            self._wanted.pop(ticket.id, None)

    def running(self) -> int:
        """Open sessions: tickets are places for them, taken when a group has closed."""
        return 0 if self.sessions is None else len(self.sessions.going_on())

    async def _watch(self) -> None:
        """Fills tickets as long as somebody waits for one; what goes wrong is theirs to hear."""
        try:
            while self._wanted:
                self._ready += await in_thread(lambda: list(self.finished.poll()))
                self.fill()
                await asyncio.sleep(GLANCE)
        except Exception as error:
            for _, future in self._wanted.values():
                if not future.done():
                    future.set_exception(error)

    def fill(self) -> None:
        """Gives every complete group that there are tickets for to them."""
        left = []
        for ready in self._ready:
            tickets = places_for(ready, [ticket for ticket, future in self._wanted.values() if not future.done()])
            if tickets is None:
                left.append(ready)
                continue
            for rollout, ticket in zip(ready.rollouts, tickets, strict=False):  # without places, it was given up
                self._wanted.pop(ticket.id)[1].set_result(replace(rollout, ticket=ticket))
        self._ready = left


def places_for(ready: Ready, tickets: Iterable[Ticket]) -> list[Ticket] | None:
    """Those of the tickets that these sessions get: in the group that others of theirs are in, or in one that is free
    as a whole. None: not yet."""
    groups: dict[Ticket, list[Ticket]] = {}
    for ticket in tickets:
        groups.setdefault(ticket.group, []).append(ticket)
    if ready.torn is not None:
        return sorted(groups.get(ready.torn, []))
    return next((sorted(group) for group in groups.values() if len(group) == len(ready.sessions)), None)


def sessions_had(journal: Path) -> dict[str, Ticket]:
    """The sessions in a run's journal, with their tickets."""
    events = (event for record in read_journal(journal) for event in events_of(record))
    return {event.rollout.task.id: event.rollout.ticket for event in events if isinstance(event, Finished)}


class OutsideAgents:
    """What stands for an environment in a run whose episodes are played elsewhere."""

    name = ENVIRONMENT

    def __init__(self, uniform_groups: UniformGroups = "drop") -> None:
        self.uniform_groups: UniformGroups = uniform_groups
        self.limits = EpisodeLimits(attempts=1)  # nobody can be asked to do it again

    def task(self, seed: int, index: int) -> Task:
        """Unknown before somebody does it."""
        return Task(f"{self.name}/{index}", (), "", self.name)

    def episode(self, task: Task) -> Episode:
        """Refused: the orchestrator has a player instead."""
        raise RuntimeError("episodes of outside agents are played by them")
