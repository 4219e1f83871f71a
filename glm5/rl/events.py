"""What happens in a run, as the journal stores it. The scheduler's state is the fold of these
events and of nothing else.

line = EVENTS.dump_json(event)          # bytes of one JSON object; `kind` says which event it is
event = EVENTS.validate_json(line)      # the equal event
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from glm5.rl.records import Group, Lesson, Rollout, Ticket


@dataclass(frozen=True, slots=True)
class Selection:
    """The samples of a group that are learnt from."""

    ticket: Ticket
    """Of the group."""
    weights: tuple[tuple[int, int], ...]
    """(sample, weight), in sample order."""

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Of the samples."""
        return tuple(sibling(self.ticket, sample) for sample, _ in self.weights)

    def group(self, rollouts: Mapping[str, Rollout]) -> Group:
        """The group itself; `rollouts` by id."""
        return Group(
            tuple(
                Lesson(rollouts[ticket.id], weight)
                for ticket, (_, weight) in zip(self.tickets, self.weights, strict=True)
            )
        )


def sibling(ticket: Ticket, sample: int) -> Ticket:
    """The ticket of another sample of the same group."""
    return Ticket(ticket.environment, ticket.task_index, ticket.attempt, sample)


@dataclass(frozen=True, slots=True)
class Started:
    """A rollout is to be made. `version`: of the weights that the engines held then."""

    ticket: Ticket
    version: int
    kind: Literal["started"] = "started"


@dataclass(frozen=True, slots=True)
class Began:
    """The oldest weights that made a token of a running rollout are known: `version`."""

    ticket: Ticket
    version: int
    kind: Literal["began"] = "began"


@dataclass(frozen=True, slots=True)
class Finished:
    """A rollout came back, whatever its outcome."""

    rollout: Rollout
    kind: Literal["finished"] = "finished"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A running rollout is called off: whoever plays it should stop. It holds its place until it is `Released`."""

    ticket: Ticket
    reason: str
    kind: Literal["cancelled"] = "cancelled"


@dataclass(frozen=True, slots=True)
class Released:
    """A cancelled rollout came back; its place is free."""

    ticket: Ticket
    kind: Literal["released"] = "released"


@dataclass(frozen=True, slots=True)
class Outdated:
    """A finished rollout has a token over the staleness bound."""

    ticket: Ticket
    kind: Literal["outdated"] = "outdated"


@dataclass(frozen=True, slots=True)
class Dropped:
    """The fate of a sample: it is not learnt from."""

    ticket: Ticket
    reason: str
    kind: Literal["dropped"] = "dropped"


@dataclass(frozen=True, slots=True)
class Requeued:
    """The fate of a sample: it is thrown away, and its task is sampled again."""

    ticket: Ticket
    reason: str
    kind: Literal["requeued"] = "requeued"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A group is ready to be learnt from; again, with other weights, when a sample of it became too old."""

    selection: Selection
    kind: Literal["accepted"] = "accepted"


@dataclass(frozen=True, slots=True)
class Ended:
    """A group is given up. `again`: its task goes back to the prompt pool."""

    ticket: Ticket
    again: bool
    kind: Literal["ended"] = "ended"


@dataclass(frozen=True, slots=True)
class BatchMade:
    """A batch was handed out: the fate of its samples is `trained`."""

    step: int
    selections: tuple[Selection, ...]
    kind: Literal["batch"] = "batch"


@dataclass(frozen=True, slots=True)
class Published:
    """The engines hold these weights."""

    version: int
    kind: Literal["published"] = "published"


@dataclass(frozen=True, slots=True)
class Limited:
    """From now on at most so many rollouts run at once."""

    max_running: int
    given: int | None = None
    """What the settings said then; None: in the journal of an earlier version."""
    kind: Literal["limited"] = "limited"


@dataclass(frozen=True, slots=True)
class Restarted:
    """The run was killed and goes on: no engine remembers anything, so cancelled rollouts hold no places."""

    kind: Literal["restarted"] = "restarted"


Event = (
    Started | Began | Finished | Cancelled | Released | Outdated | Dropped | Requeued | Accepted | Ended | BatchMade
    | Published | Limited | Restarted
)  # fmt: skip
EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])
