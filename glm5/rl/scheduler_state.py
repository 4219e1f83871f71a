"""The state of the scheduler: a fold of events. Nothing is decided here; `glm5.rl.scheduler` does that.

    state = SchedulerState(config, tasks)
    for event in journal: state.apply(event)            # the run as it was when the journal ended

`state` and `restore` are a shortcut for long journals: the state as JSON, from which the later events go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glm5.rl.accounts import Accounts
from glm5.rl.admission import SchedulerConfig
from glm5.rl.events import (
    Accepted,
    BatchMade,
    Began,
    Cancelled,
    Dropped,
    Ended,
    Event,
    Finished,
    Limited,
    Outdated,
    Published,
    Released,
    Requeued,
    Restarted,
    Started,
    sibling,
)
from glm5.rl.records import SCORED, Rollout, Ticket
from glm5.rl.tasks import TaskStream

STALE = "stale"
"""Why a sample ends that is over the staleness bound."""
NO_TOKENS = "no token to learn from"
"""Why one ends that was scored, but of which no token was drawn from the policy: its reward says nothing of it."""


@dataclass
class OpenGroup:
    """The samples of a task on their way to a batch."""

    ticket: Ticket
    number: int
    """When it was begun, counted in groups."""
    tries: int
    """How often its task was given up before."""
    started: int = 0
    """Samples begun so far, from the first."""
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    """Those that came back, by sample (`Rollout.to_learn`)."""
    oldest: dict[int, int] = field(default_factory=dict)
    """The oldest weights of each of these; none for a rollout without tokens."""
    missing: dict[int, str] = field(default_factory=dict)
    """Samples that cannot be learnt from, with the reason."""
    settled: set[int] = field(default_factory=set)
    """Samples that have their fate already."""
    weights: tuple[tuple[int, int], ...] = ()
    """(sample, weight) once the group is accepted."""

    @property
    def valid(self) -> list[int]:
        """Samples that can be learnt from, as far as known, in order."""
        return sorted(set(self.rollouts) - set(self.missing))

    @property
    def rewards(self) -> list[float]:
        """Of the valid samples."""
        return [reward.value for sample in self.valid if (reward := self.rollouts[sample].reward) is not None]

    def age(self, version: int) -> int:
        """Staleness of the accepted group: that of its oldest sample."""
        return version - min((self.oldest[s] for s, _ in self.weights if s in self.oldest), default=version)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A group that is to be begun once more."""

    ticket: Ticket
    tries: int
    """How often it was given up."""
    number: int
    """When it was begun, counted in groups."""


class SchedulerState:
    """What the events of a run have led to."""

    def __init__(self, config: SchedulerConfig, tasks: TaskStream, version: int = 0) -> None:
        """version: of the weights at the start, which engines and trainer hold."""
        self.config = config
        self.tasks = tasks
        self.accounts = Accounts()
        self.step = version
        """Of the next batch; also the version of the weights that will learn from it."""
        self.version = version
        """Of the weights that the engines hold."""
        self.max_running = self.given = config.max_running
        """Rollouts at once now, and what the settings said when that was decided."""
        self.groups: dict[str, OpenGroup] = {}
        """In the order in which they were begun."""
        self.running: dict[str, tuple[Ticket, int | None]] = {}
        """Ticket and, once known, the oldest weights that made a token, by id. After a restart: to be played again."""
        self.cancelled: dict[str, Ticket] = {}
        """Called off, and not back yet."""
        self.again: list[Waiting] = []
        """Groups to begin once more, in the order in which they were begun before."""
        self.begun = 0
        """Groups begun in the run."""
        self.begun_before = 0
        """Of these, before the last batch was made."""

    def apply(self, event: Event) -> None:
        """Changes the state as the event says. For events of a journal; nothing is decided here."""
        match event:
            case Started(ticket):
                self._start(ticket)
            case Began(ticket, version):
                self.running[ticket.id] = (ticket, version)
            case Finished(rollout):
                self._keep(rollout)
            case Cancelled(ticket, reason):
                del self.running[ticket.id]
                self.cancelled[ticket.id] = ticket
                self.groups[ticket.group.id].missing[ticket.sample] = reason
            case Released(ticket):
                del self.cancelled[ticket.id]
            case Outdated(ticket):
                self.groups[ticket.group.id].missing[ticket.sample] = STALE
            case Dropped(ticket, reason) | Requeued(ticket, reason):
                self.accounts.settle(ticket, "dropped" if isinstance(event, Dropped) else "requeued", reason)
                self.groups[ticket.group.id].settled.add(ticket.sample)
            case Accepted(selection):
                group = self.groups[selection.ticket.id]
                if not group.weights:
                    self.tasks.scored(group.ticket, group.rewards)
                group.weights = selection.weights
            case Ended(ticket, again):
                self._end(ticket, again)
            case BatchMade(step, selections):
                for selection in selections:
                    for ticket in selection.tickets:
                        self.accounts.settle(ticket, "trained")
                    self.tasks.returned(self.groups.pop(selection.ticket.id).ticket)
                self.step, self.begun_before = step + 1, self.begun
            case Published(version):
                self.version = version
            case Limited(max_running, given):
                self.max_running, self.given = max_running, given or self.config.max_running
            case Restarted():
                self.cancelled.clear()

    def _start(self, ticket: Ticket) -> None:
        name = ticket.group.id
        if name not in self.groups:
            waiting = next((waiting for waiting in self.again if waiting.ticket == ticket.group), None)
            if waiting:
                self.again.remove(waiting)
            self.tasks.take(ticket.group, again=waiting is not None)
            self.groups[name] = OpenGroup(ticket.group, self.begun, waiting.tries if waiting else 0)
            self.begun += 1
        self.groups[name].started = ticket.sample + 1
        self.running[ticket.id] = (ticket, None)
        self.accounts.begin(ticket)

    def _keep(self, rollout: Rollout) -> None:
        del self.running[rollout.id]
        group, sample = self.groups[rollout.ticket.group.id], rollout.ticket.sample
        group.rollouts[sample] = rollout.to_learn()
        versions = list(rollout.versions)
        if versions:
            group.oldest[sample] = min(versions)
        if rollout.outcome not in SCORED:
            group.missing[sample] = rollout.outcome
        elif not versions:
            group.missing[sample] = NO_TOKENS

    def _end(self, ticket: Ticket, again: bool) -> None:
        group = self.groups.pop(ticket.id)
        if not group.weights and group.rewards:
            self.tasks.scored(ticket, group.rewards)
        if again:
            following = Ticket(ticket.environment, ticket.task_index, ticket.attempt + 1)
            self.again.append(Waiting(following, group.tries + 1, group.number))
            self.again.sort(key=lambda waiting: waiting.number)
        else:
            self.tasks.returned(ticket)

    def state(self) -> dict[str, Any]:
        """Plain JSON; rollouts are named by their ids."""
        return {
            "step": self.step,
            "version": self.version,
            "max_running": [self.max_running, self.given],
            "begun": [self.begun, self.begun_before],
            "groups": [
                {"ticket": _row(group.ticket), "number": group.number, "tries": group.tries, "started": group.started,
                 "rollouts": sorted(group.rollouts), "missing": [list(pair) for pair in sorted(group.missing.items())],
                 "settled": sorted(group.settled), "weights": [list(pair) for pair in group.weights]}
                for group in self.groups.values()
            ],
            "running": [[_row(ticket), version] for ticket, version in self.running.values()],
            "cancelled": [_row(ticket) for ticket in self.cancelled.values()],
            "again": [[_row(w.ticket), w.tries, w.number] for w in self.again],
            "accounts": self.accounts.state(),
            "tasks": self.tasks.state(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any], rollouts: Mapping[str, Rollout]) -> None:
        """Goes back to `state`, taken with the same settings. `rollouts`: by id, those that its groups name."""
        self.step, self.version = state["step"], state["version"]
        self.max_running, self.given = state["max_running"]
        self.begun, self.begun_before = state["begun"]
        self.groups = {}
        for saved in state["groups"]:
            ticket = Ticket(*saved["ticket"])
            group = OpenGroup(ticket, saved["number"], saved["tries"], saved["started"])
            group.rollouts = {sample: rollouts[sibling(ticket, sample).id] for sample in saved["rollouts"]}
            group.oldest = {s: min(versions) for s, r in group.rollouts.items() if (versions := list(r.versions))}
            group.missing = dict(saved["missing"])
            group.settled = set(saved["settled"])
            group.weights = tuple((sample, weight) for sample, weight in saved["weights"])
            self.groups[ticket.id] = group
        pairs = [(Ticket(*row), version) for row, version in state["running"]]
        self.running = {ticket.id: (ticket, version) for ticket, version in pairs}
        self.cancelled = {ticket.id: ticket for ticket in (Ticket(*row) for row in state["cancelled"])}
        self.again = [Waiting(Ticket(*row), tries, number) for row, tries, number in state["again"]]
        self.accounts = Accounts.restore(state["accounts"])
        self.tasks.restore(state["tasks"])


def _row(ticket: Ticket) -> list[Any]:
    return [ticket.environment, ticket.task_index, ticket.attempt, ticket.sample]
