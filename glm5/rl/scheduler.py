"""What is sampled, what is learnt from, what becomes of the rest: a state machine without clock, threads or chance.

    for ticket in scheduler.admit(): ...                # start these rollouts
    scheduler.began(ticket, version)                    # its first token was made by these weights (optional)
    scheduler.finished(rollout)                         # it came back, with or without a reward
    batch = scheduler.next_batch()                      # learn from it, or None: not yet
    scheduler.published(version)                        # the engines hold new weights
    journal(scheduler.take_events())                    # after each call, before anything is done about it

Every change of the state is an event (`glm5.rl.events`) that goes through `apply`. A run that was killed gets its
scheduler back by applying the events of its journal to a new one, or those after a `state` to a restored one.

Two mechanisms bound the age of what is trained. The admission formula (`glm5.rl.admission`) keeps the sum of what is
under way small enough; the sweep before every batch takes out each sample with a token that is too old, and so no batch
can hold one. Batch n is learnt from by the weights of version n (each batch makes one version), however late they reach
the engines, so the age is known when the batch is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from glm5.errors import ConfigError
from glm5.rl.admission import SchedulerConfig, room
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
    Selection,
    Started,
    sibling,
)
from glm5.rl.records import Batch, Rollout, Ticket
from glm5.rl.repair import enough, repeated, uniform
from glm5.rl.scheduler_state import STALE, OpenGroup, SchedulerState
from glm5.rl.tasks import TaskSource, TaskStream

WITH_GROUP = "group given up"
"""Why a sample ends whose group has too few others left."""


class Scheduler(SchedulerState):
    """The state machine. See the module's text."""

    def __init__(self, config: SchedulerConfig, tasks: TaskStream, version: int = 0) -> None:
        """version: of the weights at the start, which engines and trainer hold."""
        if tasks.capacity is not None and tasks.capacity < config.groups_per_batch:
            raise ConfigError(
                f"The environments without a gate have {tasks.capacity} tasks, but a batch takes "
                f"{config.groups_per_batch} different ones; lower groups_per_batch."
            )
        super().__init__(config, tasks, version)
        self._events: list[Event] = []

    # What happens.

    def admit(self, *, new_groups: bool = True) -> list[Ticket]:
        """The rollouts to start now. new_groups: whether groups are begun."""
        admitted: list[Ticket] = []
        limits = {name: source.max_running for name, source in self.tasks.sources.items()}
        limited = any(limit is not None for limit in limits.values())
        running = Counter(ticket.environment for ticket in self._holding_places()) if limited else Counter[str]()
        while len(self.running) + len(self.cancelled) < self.max_running:
            free = [name for name, limit in limits.items() if limit is None or running[name] < limit]
            ticket = self._next_ticket(free, new_groups=new_groups)
            if ticket is None:
                break
            self._emit(Started(ticket, self.version))
            running[ticket.environment] += 1
            admitted.append(ticket)
        return admitted

    def began(self, ticket: Ticket, version: int) -> None:
        """The first token of a running rollout was made by these weights: it is called off once it is too old."""
        if self.running.get(ticket.id, (ticket, version))[1] != version:
            self._emit(Began(ticket, version))

    def finished(self, rollout: Rollout) -> bool:
        """A rollout came back. False, and nothing changes, when it is not awaited: a delivery that came twice."""
        if rollout.id in self.cancelled:
            self._emit(Released(rollout.ticket))
        elif rollout.id in self.running:
            self._emit(Finished(rollout))
            self._judge(self.groups[rollout.ticket.group.id])
        else:
            return False
        return True

    def next_batch(self) -> Batch | None:
        """What step `self.step` learns from, when there is enough; every call that gives a batch counts as a step."""
        if self._choose() is None:
            return None
        self._sweep()
        chosen = self._choose()
        if chosen is None:
            return None
        selections = tuple(Selection(group.ticket, group.weights) for group in chosen)
        groups = tuple(
            selection.group({rollout.id: rollout for rollout in group.rollouts.values()})
            for selection, group in zip(selections, chosen, strict=True)
        )
        batch = Batch(self.step, self.step, groups)
        self._emit(BatchMade(self.step, selections))
        return batch

    def published(self, version: int) -> None:
        """The engines hold these weights now."""
        if not self.version <= version <= self.step:
            raise RuntimeError(f"version {version} cannot follow {self.version} when {self.step} batches were made")
        self._emit(Published(version))
        self._sweep()

    def limit(self, max_running: int) -> None:
        """At most so many rollouts at once from now on; what runs already goes on."""
        limited = Limited(max_running, self.config.max_running)
        if limited != Limited(self.max_running, self.given):
            self._emit(limited)

    def restarted(self) -> list[Ticket]:
        """To be called when the journal was applied: the rollouts that were under way and have to be played again."""
        self._emit(Restarted())
        return [ticket for ticket, _ in self.running.values()]

    def take_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    @property
    def swappable(self) -> bool:
        """Whether the engines may take new weights now: in sync and one-step-off mode only between two samplings, which
        a moment is not in which nothing runs because the rest of a batch has had no place yet."""
        if self.config.mode == "async":
            return True
        between = self.begun == self.begun_before or self._choose() is not None
        return between and not (self.running or self.cancelled)

    # Decisions.

    def _next_ticket(self, free: list[str], *, new_groups: bool) -> Ticket | None:
        for group in self.groups.values():
            if group.started < self.config.group_size and group.ticket.environment in free:
                return sibling(group.ticket, group.started)
        if not new_groups:
            return None
        accepted = sum(bool(group.weights) for group in self.groups.values())
        open = len(self.groups) - accepted
        if room(self.config, step=self.step, published=self.version, open=open, accepted=accepted,
                begun=self.begun - self.begun_before) <= 0:  # fmt: skip
            return None
        again = next((w.ticket for w in self.again if w.ticket.environment in free), None)
        return again or self.tasks.choose(free)

    def _choose(self) -> list[OpenGroup] | None:
        """The groups of the next batch. async: the oldest first. Otherwise: in the order in which they were begun."""
        accepted = [group for group in self.groups.values() if group.weights]
        wanted, begun = self.config.groups_per_batch, self.begun - self.begun_before
        if self.config.mode != "async" and not self.config.refill:
            return accepted if begun == wanted and len(accepted) == len(self.groups) else None
        if len(accepted) < wanted:
            return None
        if self.config.mode == "async":
            accepted.sort(key=lambda group: -group.age(self.step))
        return accepted[:wanted]

    def _sweep(self) -> None:
        """Takes out every sample that the next batch could not hold, and calls off those that run in vain."""
        oldest_allowed = self.step - self.config.bound
        for group in list(self.groups.values()):
            found: list[Event] = [
                Outdated(sibling(group.ticket, sample))
                for sample, oldest in sorted(group.oldest.items())
                if oldest < oldest_allowed and sample not in group.missing
            ]
            for ticket in self._running_of(group):
                version = self.running[ticket.id][1]
                if version is not None and version < oldest_allowed:
                    found.append(Cancelled(ticket, STALE))
            for event in found:
                self._emit(event)
            if found:
                self._judge(group)

    def _judge(self, group: OpenGroup) -> None:
        """Gives up a group that has lost too much; accepts or filters one that is complete."""
        size, reasons = self.config.group_size, group.missing
        if not enough(size - len(reasons), size, self.config.repair):
            self._give_up(group)
        elif len(group.valid) + len(reasons) == size:
            keep = self._source(group).uniform_groups == "keep"
            verdict = None if keep else uniform(group.rewards)
            for sample in sorted(set(reasons) - group.settled):
                self._emit(Dropped(sibling(group.ticket, sample), reasons[sample]))
            if verdict is None:
                self._emit(Accepted(Selection(group.ticket, repeated(group.valid, size))))
                return
            for sample in group.valid:
                self._emit(Dropped(sibling(group.ticket, sample), verdict))
            self._emit(Ended(group.ticket, again=False))

    def _give_up(self, group: OpenGroup) -> None:
        only_stale = set(group.missing.values()) == {STALE}
        attempts = self._source(group).max_attempts or self.config.max_attempts
        again = group.tries + 1 < attempts and not (only_stale and self.config.stale == "drop")
        fate = Requeued if again else Dropped
        for ticket in self._running_of(group):
            self._emit(Cancelled(ticket, WITH_GROUP))
        for sample in range(group.started):
            if sample not in group.settled:
                self._emit(fate(sibling(group.ticket, sample), group.missing.get(sample, WITH_GROUP)))
        self._emit(Ended(group.ticket, again))

    def _source(self, group: OpenGroup) -> TaskSource:
        return self.tasks.sources[group.ticket.environment]

    def _running_of(self, group: OpenGroup) -> list[Ticket]:
        samples = (s for s in range(group.started) if s not in group.rollouts and s not in group.missing)
        return [sibling(group.ticket, sample) for sample in samples]

    def _holding_places(self) -> Iterator[Ticket]:
        yield from (ticket for ticket, _ in self.running.values())
        yield from self.cancelled.values()

    def _emit(self, event: Event) -> None:
        self.apply(event)
        self._events.append(event)
