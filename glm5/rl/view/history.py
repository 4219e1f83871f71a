"""What became of every rollout: the finished ones with their fates, from the events of a journal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from glm5.rl.events import BatchMade, Dropped, Event, Finished, Requeued
from glm5.rl.records import Fate, Rollout


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


def history(events: Iterable[Event]) -> list[Told]:
    """The rollouts in the order in which they finished."""
    found: dict[str, Told] = {}
    for event in events:
        if isinstance(event, Finished):
            found[event.rollout.id] = Told(event.rollout)
        elif isinstance(event, BatchMade):
            for selection in event.selections:
                for ticket, (_, weight) in zip(selection.tickets, selection.weights, strict=True):
                    found[ticket.id] = replace(found[ticket.id], fate="trained", step=event.step, weight=weight)
        elif isinstance(event, Dropped | Requeued) and event.ticket.id in found:
            fate: Fate = "dropped" if isinstance(event, Dropped) else "requeued"
            found[event.ticket.id] = replace(found[event.ticket.id], fate=fate, because=event.reason)
    return list(found.values())


def told(rollouts: Iterable[Rollout]) -> list[Told]:
    """Rollouts that no scheduler has judged, as recorded sessions."""
    return [Told(rollout) for rollout in rollouts]
