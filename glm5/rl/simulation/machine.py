"""The run in virtual time. Everything that takes time is here; everything that is decided is in the scheduler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from glm5.envs import Reward, Task
from glm5.errors import InputError
from glm5.rl.clock import VirtualClock
from glm5.rl.concurrency import Load, next_limit
from glm5.rl.events import Accepted, Cancelled, Dropped, Requeued
from glm5.rl.records import SCORED, Batch, Outcome, Rollout, Ticket, Trajectory
from glm5.rl.scheduler import Scheduler
from glm5.rl.simulation.config import NothingTeaches, Simulation, SimulationConfig
from glm5.rl.simulation.engines import VirtualEngines
from glm5.rl.simulation.workload import Play
from glm5.rl.tasks import TaskStream
from glm5.scoring import Grade

NO_TASK = Task("simulated", (), "", "")
NO_GRADE = Grade("not_attempted", "simulated")
GROUPS_IN_VAIN = 1024
"""Groups in a row that teach nothing, after which a simulation ends. A real run ends sooner (`groups_in_vain`); here
they cost next to nothing."""


def simulate(config: SimulationConfig) -> Simulation:
    """Plays the run to its last batch. Raises InputError when the settings let nothing move or nothing teaches."""
    return _Machine(config).run()


def sweep(
    config: SimulationConfig, *, max_staleness: Sequence[int] = (), max_running: Sequence[int] = ()
) -> list[Simulation]:
    """sync, one-step-off, and async once for each staleness; all of them for each concurrency."""
    base, found = config.scheduler, []
    for running in max_running or (base.max_running,):
        every, simple = base.publish_every, replace(base, max_running=running, publish_every=1)
        chosen = [replace(simple, mode="sync"), replace(simple, mode="one-step-off", publish_every=min(every, 2))]
        for bound in max_staleness or (base.max_staleness,):
            oftener = min(every, bound + 1)
            chosen.append(replace(simple, mode="async", max_staleness=bound, publish_every=oftener))
        found += [simulate(replace(config, scheduler=scheduler)) for scheduler in chosen]
    return found


@dataclass
class _Playing:
    """A rollout under way."""

    ticket: Ticket
    play: Play
    turn: int = 0
    made: float = 0.0
    """Tokens of the turns before."""
    version: int | None = None
    """Of its first token."""


@dataclass
class _Sums:
    """What is added up after the warm-up."""

    since: float = 0.0
    training: float = 0.0
    sampling: float = 0.0
    sampled: float = 0.0
    beyond: float = 0.0
    learnt: float = 0.0
    wasted: float = 0.0
    rollouts: int = 0
    staleness: Counter[int] = field(default_factory=Counter)


class _Machine:
    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config.scheduler, TaskStream(config.sources, config.seed))
        self.engines = VirtualEngines(config.engine)
        self.clock: VirtualClock[tuple[str, str]] = VirtualClock()
        self.playing: dict[str, _Playing] = {}
        self.tokens: dict[str, float] = {}
        """Sampled, by rollout, until its fate is known."""
        self.batch: Batch | None = None
        """That is learnt from now."""
        self.work = 0.0
        """Seconds that the trainer still needs for it."""
        self.unpublished: int | None = None
        self.publishing = self.standing = False
        self.learnt = 0
        self.sums = _Sums()
        self.waited = 0.0
        """Seconds that the trainer waited for this batch."""
        self.most_running = 0
        """Since the last batch."""
        self.in_vain: Counter[str] = Counter()
        """Samples dropped since the last group that teaches, by reason."""
        self.timeline: list[tuple[float, int, int]] = []

    def run(self) -> Simulation:
        self._move()
        while self.learnt < self.config.batches:
            self._wait()
            self._move()
        return self._result()

    # Time.

    def _wait(self) -> None:
        """Passes the time until the next thing happens, and lets it happen."""
        both = self.batch is not None and bool(self.engines.active) and not self.standing
        share = self.config.shared if both else 1.0
        speed = 0.0 if self.standing or not self.engines.active else share * self.engines.total
        each = speed / max(1, len(self.engines.active))
        first = self.engines.first()
        sampled = self.clock.now + (first[0] / each if first and each else math.inf)
        trained = self.clock.now + (self.work / share if self.batch is not None else math.inf)
        then = min(sampled, trained, self.clock.due)
        if then == math.inf:
            raise InputError("Nothing can move in the simulated run: no environment gives another task.")
        seconds = then - self.clock.now
        self.sums.sampled += speed * seconds
        self.sums.beyond += speed * seconds if self.engines.beyond else 0.0
        self.sums.sampling += seconds if speed else 0.0
        busy = self.batch is not None or self.publishing
        self.sums.training += seconds if busy else 0.0
        self.waited += 0.0 if busy else seconds
        self.work -= seconds * share
        self.engines.made += each * seconds
        self.clock.now = then
        if then == sampled and first:
            self.engines.made = self.engines.active[first[1]]
            self._turn_made(first[1])
        elif then == trained:
            self._learnt()
        else:
            self._due()

    def _due(self) -> None:
        what = self.clock.next()
        assert what is not None
        kind, name = what
        if kind == "tool" and name in self.playing:
            self._next_turn(self.playing[name])
        elif kind == "stand":
            self.standing = True
            self.clock.after(self.config.swap_seconds, ("published", ""))
        elif kind == "published":
            assert self.unpublished is not None
            self.scheduler.published(self.unpublished)
            self.publishing, self.standing, self.unpublished = False, False, None

    # What can be done now.

    def _move(self) -> None:
        """Everything that takes no time."""
        if self.unpublished is not None and not self.publishing and self.scheduler.swappable:
            self.publishing = True
            self.clock.after(self.config.publish_seconds - self.config.swap_seconds, ("stand", ""))
        if self.batch is None and not self.publishing and self.unpublished is None:
            self._take_batch()
        while True:
            for ticket in self.scheduler.admit():
                self._start(ticket)
            if not self._settle():
                return

    def _take_batch(self) -> None:
        batch = self.scheduler.next_batch()
        if batch is None:
            return
        tokens = sum(self.tokens[rollout.id] for rollout in batch.rollouts)
        config = self.config
        self.batch = batch
        self.work = config.train_seconds + config.train_seconds_per_token * tokens if batch.groups else 0.0
        ready = sum(bool(group.weights) for group in self.scheduler.groups.values())
        self.timeline.append((self.clock.now, len(self.playing), ready))
        if config.concurrency:
            since = self.timeline[-2][0] if len(self.timeline) > 1 else 0.0
            load = Load(running=self.most_running, waiting=len(self.engines.waiting), ready=ready,
                        trainer_idle=self.waited / max(1e-9, self.clock.now - since))  # fmt: skip
            limit = next_limit(config.concurrency, config.scheduler, self.scheduler.max_running, load)
            self.scheduler.limit(limit)
        self.waited, self.most_running = 0.0, 0

    def _learnt(self) -> None:
        assert self.batch is not None
        for rollout in self.batch.rollouts:
            self.sums.learnt += self.tokens.pop(rollout.id)
            self.sums.rollouts += 1
            self.sums.staleness[rollout.staleness(self.batch.version)] += 1
        self.batch, self.work = None, 0.0
        self.learnt += 1
        if self.learnt % self.config.scheduler.publish_every == 0:
            self.unpublished = self.learnt
        if self.learnt == self.config.warmup:
            self.sums = _Sums(since=self.clock.now)

    def _settle(self) -> bool:
        """Stops what was called off, and counts what is thrown away. Whether anything was stopped."""
        stopped = []
        for event in self.scheduler.take_events():
            if isinstance(event, Cancelled):
                stopped.append(self._stop(self.playing[event.ticket.id]))
            elif isinstance(event, Dropped | Requeued):
                self.sums.wasted += self.tokens.pop(event.ticket.id, 0.0)
            if isinstance(event, Dropped):
                self.in_vain[event.reason] += 1
            elif isinstance(event, Accepted):
                self.in_vain.clear()
        if self.in_vain.total() >= GROUPS_IN_VAIN * self.config.scheduler.group_size:
            counts = " and ".join(f"{count} {reason}" for reason, count in sorted(self.in_vain.items()))
            raise NothingTeaches(
                f"The simulated run learns nothing from {GROUPS_IN_VAIN} groups in a row: their samples are dropped "
                f"({counts}); take a record with more groups whose rewards differ, or keep uniform ones."
            )
        for playing in stopped:
            self.scheduler.finished(self._rollout(playing, "aborted"))
        return bool(stopped)

    # Rollouts.

    def _start(self, ticket: Ticket) -> None:
        seed = self.config.seed
        pooled = self.scheduler.tasks.sources[ticket.environment].pools is not None
        task = f"{ticket.environment}/{ticket.task_index}" if pooled else ticket.group.id  # as hard as it was before
        chance = Random(f"{seed}/{ticket.group.id}/{ticket.sample}")
        play = self.config.workloads[ticket.environment].play(ticket, Random(f"{seed}/{task}"), chance)
        self.playing[ticket.id] = _Playing(ticket, play)
        self.most_running = max(self.most_running, len(self.playing))
        self._generate(self.playing[ticket.id])

    def _generate(self, playing: _Playing) -> None:
        if self.engines.add(playing.ticket.id, playing.play.tokens[playing.turn]):
            self._began(playing)

    def _began(self, playing: _Playing) -> None:
        if playing.version is None:
            playing.version = self.scheduler.version
            self.scheduler.began(playing.ticket, playing.version)

    def _turn_made(self, name: str) -> None:
        for following in self.engines.remove(name):
            self._began(self.playing[following])
        playing = self.playing[name]
        playing.made += playing.play.tokens[playing.turn]
        self.clock.after(playing.play.tool_seconds[playing.turn], ("tool", name))

    def _next_turn(self, playing: _Playing) -> None:
        playing.turn += 1
        if playing.turn < len(playing.play.tokens):
            self._generate(playing)
            return
        del self.playing[playing.ticket.id]
        self.tokens[playing.ticket.id] = playing.made
        self.scheduler.finished(self._rollout(playing, playing.play.outcome))

    def _stop(self, playing: _Playing) -> _Playing:
        name = playing.ticket.id
        del self.playing[name]
        left = self.engines.active.get(name)
        under_way = 0.0 if left is None else playing.play.tokens[playing.turn] - (left - self.engines.made)
        self.tokens[name] = playing.made + under_way
        for following in self.engines.remove(name):
            if following in self.playing:
                self._began(self.playing[following])
        return playing

    def _rollout(self, playing: _Playing, outcome: Outcome) -> Rollout:
        version = -1 if playing.version is None else playing.version
        token = Trajectory((0, 0), (False, True), (0.0, 0.0), (-1, version))
        reward = Reward(playing.play.reward, NO_GRADE) if outcome in SCORED else None
        return Rollout(playing.ticket, NO_TASK, (token,), outcome, reward)

    def _result(self) -> Simulation:
        sums, config = self.sums, self.config
        seconds = max(1e-9, self.clock.now - sums.since)
        peak = max(speed for _, speed in config.engine.points) * config.engine.engines
        return Simulation(
            mode=config.scheduler.mode,
            max_staleness=config.scheduler.bound,
            max_running=self.scheduler.max_running,
            seconds=seconds,
            steps_per_hour=3600 * (config.batches - config.warmup) / seconds,
            rollouts_per_second=sums.rollouts / seconds,
            tokens_per_second=sums.learnt / seconds,
            sampled_tokens_per_second=sums.sampled / seconds,
            trainer_idle=max(0.0, 1 - sums.training / seconds),
            sampler_idle=max(0.0, 1 - sums.sampling / seconds),
            sampler_use=sums.sampled / seconds / peak,
            beyond=sums.beyond / max(1.0, sums.sampled),
            wasted=sums.wasted / max(1.0, sums.wasted + sums.learnt),
            staleness=dict(sums.staleness),
            accounts=self.scheduler.accounts.metrics(),
            timeline=tuple(self.timeline),
        )
