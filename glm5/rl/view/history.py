"""What became of every rollout: the finished ones with their fates, from the events of a journal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from glm5.rl.events import BatchMade, Dropped, Event, Finished, Requeued
from glm5.rl.records import Fate, Rollout, Ticket

RUN_ENDED = "the run ended"
"""Why a sample is dropped that a finished run has not learnt from."""


@dataclass(frozen=True, slots=True)
class Told:
    """A rollout with its fate."""

    rollout: Rollout
    fate: Fate | Literal["waiting"] = "waiting"
    because: str = ""
    """The reason of a drop or a requeue."""
    step: int | None = None
    """That was learnt from it."""
    weight: int = 1
    """In that step; a repeat in group repair counts as often."""

    @property
    def tokens(self) -> int:
        """Of all its paths, context included."""
        return sum(len(trajectory.token_ids) for trajectory in self.rollout.trajectories)


class History:
    """Follows the events of a run and keeps its newest groups, so that a long run takes no more memory.

    keep_tokens: older groups are forgotten while the others have at least so many tokens; None keeps all.
    """

    def __init__(self, keep_tokens: int | None = None) -> None:
        self.finished = 0
        """Rollouts that came back, forgotten ones included."""
        self._keep_tokens = keep_tokens
        self._groups: dict[str, dict[str, Told]] = {}
        self._tokens = 0

    def follow(self, events: Iterable[Event]) -> History:
        """Takes the events in; gives itself."""
        for event in events:
            if isinstance(event, Finished):
                self._add(Told(event.rollout))
            elif isinstance(event, BatchMade):
                for selection in event.selections:
                    for ticket, (_, weight) in zip(selection.tickets, selection.weights, strict=True):
                        self._settle(ticket, "trained", step=event.step, weight=weight)
            elif isinstance(event, Dropped):
                self._settle(event.ticket, "dropped", because=event.reason)
            elif isinstance(event, Requeued):
                self._settle(event.ticket, "requeued", because=event.reason)
        return self

    def ended(self) -> None:
        """The run is finished: what waits is dropped. The journal does not say so, for a longer run goes on with it."""
        for members in self._groups.values():
            for name, one in members.items():
                if one.fate == "waiting":
                    members[name] = replace(one, fate="dropped", because=RUN_ENDED)

    def __iter__(self) -> Iterator[Told]:
        """Group after group in the order of their first ends; in a group by sample."""
        for members in self._groups.values():
            yield from sorted(members.values(), key=lambda one: one.rollout.ticket.sample)

    def _add(self, one: Told) -> None:
        self.finished += 1
        self._groups.setdefault(one.rollout.ticket.group.id, {})[one.rollout.id] = one
        self._tokens += one.tokens
        while self._keep_tokens is not None and len(self._groups) > 1:
            name, oldest = next(iter(self._groups.items()))
            size = sum(member.tokens for member in oldest.values())
            if self._tokens - size < self._keep_tokens:
                break
            del self._groups[name]
            self._tokens -= size

    def _settle(self, ticket: Ticket, fate: Fate, because: str = "", step: int | None = None, weight: int = 1) -> None:
        """Only what came back can be seen."""
        members = self._groups.get(ticket.group.id, {})
        if ticket.id in members:
            members[ticket.id] = replace(members[ticket.id], fate=fate, because=because, step=step, weight=weight)


def waiting(events: Iterable[Event]) -> int:
    """How many rollouts came back and have no fate, without keeping any: what `History.ended` would settle."""
    names: set[str] = set()
    for event in events:
        if isinstance(event, Finished):
            names.add(event.rollout.id)
        elif isinstance(event, BatchMade):
            names.difference_update(ticket.id for one in event.selections for ticket in one.tickets)
        elif isinstance(event, Dropped | Requeued):
            names.discard(event.ticket.id)
    return len(names)


def told(rollouts: Iterable[Rollout]) -> list[Told]:
    """Rollouts that no scheduler has judged, as recorded sessions."""
    return [Told(rollout) for rollout in rollouts]
