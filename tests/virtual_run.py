"""Runs of the scheduler in virtual time, with everything that can go wrong, and an audit that trusts only the events.

The audit knows nothing of the scheduler's code: what must hold is computed from the journal alone.
"""

import random
from collections import Counter

from thin_rollouts import fold, rollout

from glm5.rl.clock import VirtualClock
from glm5.rl.events import (
    EVENTS,
    BatchMade,
    Cancelled,
    Dropped,
    Ended,
    Finished,
    Limited,
    Published,
    Released,
    Requeued,
    Restarted,
    Started,
)
from glm5.rl.records import SCORED
from glm5.rl.scheduler import Scheduler
from glm5.rl.tasks import TaskStream


class Audit:
    """The rules, held against a journal event by event. Any violation is an AssertionError."""

    def __init__(self, config, sources, version=0):
        self.config, self.sources = config, {source.environment: source for source in sources}
        self.step = self.version = version
        self.max_running = config.max_running
        self.rollouts, self.fates = {}, {}
        self.running, self.cancelled = {}, {}
        self.called_off = set()  # samples without a fate that will never come back
        self.live = set()  # groups begun and not over
        self.owed = set()  # groups that must be begun again
        self.trained_groups = set()

    def see(self, event):
        match event:
            case Started(ticket, version):
                self.start(ticket, version)
            case Finished(it):
                assert self.running.pop(it.id) and it.id not in self.fates
                self.rollouts[it.id] = it
            case Cancelled(ticket):
                self.cancelled[ticket.id] = self.running.pop(ticket.id)
                self.called_off.add(ticket.id)
            case Released(ticket):
                del self.cancelled[ticket.id]
            case Dropped(ticket, reason) | Requeued(ticket, reason):
                assert reason
                if reason in ("all right", "all wrong"):
                    assert self.sources[ticket.environment].uniform_groups == "drop", "hidden from abstention"
                self.settle(ticket, type(event).__name__)
            case Ended(ticket, again):
                self.live.remove(ticket.id)
                if again:
                    self.owed.add((ticket.environment, ticket.task_index, ticket.attempt + 1))
            case BatchMade():
                self.batch(event)
            case Published(version):
                assert version >= self.version
                self.version = version
            case Limited(max_running):
                self.max_running = max_running
            case Restarted():
                self.cancelled.clear()

    def start(self, ticket, version):
        assert ticket.id not in self.running and ticket.id not in self.fates and ticket.id not in self.rollouts
        assert version == self.version and 0 <= ticket.sample < self.config.group_size
        key = (ticket.environment, ticket.task_index, ticket.attempt)
        source = self.sources[ticket.environment]
        if ticket.group.id not in self.live:
            self.live.add(ticket.group.id)
            self.owed.discard(key)
            trained = self.step * self.config.groups_per_batch
            most = (self.config.bound + self.version + 1) * self.config.groups_per_batch
            assert len(self.live) + trained <= most, "admission"
            if source.pools is None:
                assert ticket.attempt < self.config.max_attempts, "tried for ever"
        self.running[ticket.id] = ticket
        places = [*self.running.values(), *self.cancelled.values()]
        assert len(places) <= self.max_running, "concurrency"
        if source.max_running is not None:
            assert sum(t.environment == ticket.environment for t in places) <= source.max_running, "speed"

    def batch(self, event):
        assert event.step == self.step
        self.step += 1
        size, config = self.config.group_size, self.config
        full = config.mode == "async" or config.refill
        groups = len(event.selections)
        assert groups == config.groups_per_batch or (groups < config.groups_per_batch and not full)
        for selection in event.selections:
            assert selection.ticket.id not in self.trained_groups
            self.trained_groups.add(selection.ticket.id)
            self.live.remove(selection.ticket.id)
            kept = [self.rollouts[ticket.id] for ticket in selection.tickets]
            samples = [sample for sample, _ in selection.weights]
            assert samples == sorted(set(samples)), "sample order"
            filled = [samples[i % len(samples)] for i in range(size)]
            assert dict(selection.weights) == Counter(filled), "repair"
            assert len(kept) == size or (config.repair == "repeat" and 2 * len(kept) > size), "repair"
            for one in kept:
                self.settle(one.ticket, "trained")
                assert one.outcome in SCORED, "a failure is trained"
                assert event.step - min(one.versions, default=event.step) <= config.bound, "bound"
            if size > 1 and self.sources[selection.ticket.environment].uniform_groups == "drop":
                assert len({one.reward.value for one in kept}) > 1, "uniform"

    def settle(self, ticket, fate):
        assert ticket.id not in self.fates, f"{ticket.id} is {self.fates.get(ticket.id)} and {fate}"
        assert ticket.id not in self.running
        self.fates[ticket.id] = fate
        self.called_off.discard(ticket.id)

    def agrees(self, scheduler):
        """Nothing is lost, and the accounts are exact."""
        held = {name for name in self.rollouts if name not in self.fates}
        assert set(scheduler.accounts.open) == held | set(self.running) | self.called_off, "lost"
        assert set(scheduler.running) == set(self.running) and set(scheduler.cancelled) == set(self.cancelled)
        assert set(scheduler.groups) == self.live
        in_groups = {r.id for group in scheduler.groups.values() for r in group.rollouts.values()}
        assert held <= in_groups and {name.rsplit("/", 1)[0] for name in self.called_off} <= {
            name.rsplit("/", 1)[0] for name in self.live}, "lost"  # fmt: skip
        waiting = {(w.ticket.environment, w.ticket.task_index, w.ticket.attempt) for w in scheduler.again}
        assert self.owed == waiting, "a task is lost"
        counts, totals = Counter(self.fates.values()), scheduler.accounts.metrics()
        assert scheduler.accounts.begun == len(self.fates) + len(scheduler.accounts.open)
        assert totals["trained"] == counts["trained"]
        assert sum(totals["dropped"].values()) == counts["Dropped"]
        assert sum(totals["requeued"].values()) == counts["Requeued"]
        assert totals["sampled"] == len(self.fates)


class VirtualRun:
    """A run whose engines, environments, trainer and machine are made of random numbers."""

    def __init__(self, config, sources, seed, *, failing=0.15, dying=0.03, crashing=0.02, lag=0.2, make=Scheduler):
        self.config, self.sources, self.chance = config, sources, random.Random(seed)
        self.failing, self.dying, self.crashing, self.lag = failing, dying, crashing, lag
        self.log, self.committed, self.make = [], 0, make
        self.scheduler = make(config, TaskStream(sources))
        self.audit = Audit(config, sources)
        self.clock, self.learning, self.publishing, self.crashes = VirtualClock(), False, None, 0
        self.playing = {}  # id -> (ticket, version of its first token)

    def run(self, batches, most=20_000):
        """Until so many batches are learnt from. Fails when nothing can move, or nothing comes of it."""
        self.move()
        for _ in range(most):
            if self.scheduler.step >= batches and not self.learning:
                return self
            what = self.clock.next()
            assert what is not None, "deadlock"
            if self.chance.random() < self.crashing:
                self.crash()
            else:
                self.happen(*what)
            self.move()
        raise AssertionError("no progress")

    def happen(self, kind, *about):
        chance = self.chance
        if kind == "learnt":
            self.learning = False
            if self.scheduler.step % self.config.publish_every == 0:
                self.publishing = self.scheduler.step
        elif kind == "engine" and self.playing.get(about[0].id, (None, 0, 0))[2] == about[1]:
            ticket, version, _ = self.playing.pop(about[0].id)
            if chance.random() < self.dying:  # the engine is gone; played once more, elsewhere
                return self.play(ticket)
            outcome = chance.choice(["timeout", "env_failure"]) if chance.random() < self.failing else "ok"
            versions = sorted(chance.randint(version, self.scheduler.version) for _ in range(chance.randint(0, 3)))
            self.deliver(rollout(ticket, (version, *versions), chance.choice([0.0, 0.0, 1.0]), outcome))

    def deliver(self, it):
        self.scheduler.finished(it)
        if self.chance.random() < 0.1:
            assert not self.scheduler.finished(it), "a second delivery"

    def play(self, ticket):
        version = max(0, self.scheduler.version - (self.chance.random() < self.lag))
        if self.chance.random() < 0.5:
            self.scheduler.began(ticket, version)
        number = self.chance.random()
        self.playing[ticket.id] = (ticket, version, number)
        self.clock.after(self.chance.paretovariate(1.1), ("engine", ticket, number))

    def move(self):
        """All that can be done now is done, and journalled."""
        if self.publishing is not None and self.scheduler.swappable:
            self.scheduler.published(self.publishing)
            self.publishing = None
        if not self.learning and self.scheduler.next_batch():
            self.learning = True
            self.clock.after(self.chance.uniform(0.1, 4.0), ("learnt",))
        for ticket in self.scheduler.admit():
            self.play(ticket)
        self.record()
        for name in [name for name in self.playing if name in self.scheduler.cancelled]:
            ticket, version, _ = self.playing.pop(name)
            self.scheduler.finished(rollout(ticket, (version,), outcome="aborted"))
        for ticket in self.scheduler.admit():
            self.play(ticket)
        self.record()

    def record(self):
        events = self.scheduler.take_events()
        for event in events:
            self.audit.see(event)
        self.log += events
        self.audit.agrees(self.scheduler)
        if self.chance.random() < 0.7:
            self.committed = len(self.log)

    def crash(self):
        """All that was not committed is lost; trainer and engines start again from what the journal says."""
        self.crashes += 1
        self.log = [EVENTS.validate_json(EVENTS.dump_json(event)) for event in self.log[: self.committed]]
        self.scheduler = self.make(self.config, TaskStream(self.sources))
        self.audit = Audit(self.config, self.sources)
        for event in self.log:
            self.scheduler.apply(event)
            self.audit.see(event)
        self.clock, self.learning, self.playing = VirtualClock(), False, {}
        for ticket in self.scheduler.restarted():
            self.play(ticket)
        self.publishing = self.scheduler.step if self.scheduler.step % self.config.publish_every == 0 else None
        self.record()
        state = fold(self.config, TaskStream(self.sources), self.log, self.make)
        assert state.state() == self.scheduler.state(), "the journal is not the state"
