"""What holds for all runs: never trained twice, never lost, never too old, no deadlock, exact accounts.

Random runs in virtual time with failures, deaths, crashes and late weights, checked by an audit of the journal; and
arbitrary orders of calls. The last test breaks the scheduler on purpose and sees that these tests would tell.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from thin_rollouts import fold, rollout
from virtual_run import Audit, VirtualRun

from glm5.rl.admission import SchedulerConfig
from glm5.rl.events import Finished
from glm5.rl.scheduler import Scheduler
from glm5.rl.tasks import Band, Gate, Pools, TaskSource, TaskStream


@st.composite
def configs(draw):
    mode = draw(st.sampled_from(["async", "async", "async", "sync", "one-step-off"]))
    staleness = draw(st.integers(0, 3))
    bound = {"sync": 0, "one-step-off": 1, "async": staleness}[mode]
    return SchedulerConfig(
        mode=mode,
        groups_per_batch=draw(st.integers(1, 3)),
        group_size=draw(st.integers(1, 4)),
        max_staleness=staleness,
        max_attempts=draw(st.integers(1, 3)),
        max_running=draw(st.integers(1, 14)),
        stale=draw(st.sampled_from(["requeue", "drop"])),
        repair=draw(st.sampled_from(["repeat", "never"])),
        refill=draw(st.booleans()),
        publish_every=draw(st.integers(1, 1 if mode != "async" else bound + 1)),
    )


@st.composite
def mixtures(draw):
    first = TaskSource(
        environment="a",
        weight=draw(st.sampled_from([0.3, 1.0, 2.0])),
        max_running=draw(st.sampled_from([None, 1, 3])),
        uniform_groups=draw(st.sampled_from(["keep", "drop"])),
    )
    second = TaskSource(
        environment="b",
        pools=draw(st.sampled_from([None, Pools(size=3), Pools(size=5, easy=0.0, hard=0.0)])),
        gate=draw(st.sampled_from([None, Gate(environment="a", success=0.3, groups=2)])),
        band=draw(st.sampled_from([None, Band(low=0.2, high=0.6, outside=0.5)])),
    )
    return draw(st.sampled_from([[first], [first, second]]))


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))


def random_run(config, sources, seed):
    VirtualRun(config, sources, seed).run(batches=8)


test_random_runs = QUICK(given(configs(), mixtures(), st.integers(0, 2**32))(random_run))
test_many_random_runs = pytest.mark.soak(LONG(given(configs(), mixtures(), st.integers(0, 2**32))(random_run)))


class AnyOrder(RuleBasedStateMachine):
    """Calls in any order that the rules of the scheduler allow, by an adversary who also restarts it at any moment."""

    @initialize(config=configs(), sources=mixtures())
    def begin(self, config, sources):
        self.config, self.sources = config, sources
        self.scheduler, self.audit, self.log = Scheduler(config, TaskStream(sources)), Audit(config, sources), []
        self.committed = 0

    def ticket(self, number, tickets):
        return list(tickets)[number % len(tickets)]

    @rule()
    def admit(self):
        self.scheduler.admit()

    @rule(
        outcome=st.sampled_from(["ok", "ok", "ok", "truncated", "env_failure", "timeout", "aborted"]),
        number=st.integers(0, 99),
        reward=st.sampled_from([0.0, 1.0]),
        age=st.integers(0, 4),
        tokens=st.integers(0, 2),
    )
    @precondition(lambda self: self.scheduler.running)
    def finish(self, number, outcome, reward, age, tokens):
        ticket, _ = self.ticket(number, self.scheduler.running.values())
        versions = (self.scheduler.version, self.scheduler.version - age)[:tokens]
        assert self.scheduler.finished(rollout(ticket, versions, reward, outcome))

    @rule(number=st.integers(0, 99), age=st.integers(0, 4))
    @precondition(lambda self: self.scheduler.running)
    def first_token(self, number, age):
        ticket, _ = self.ticket(number, self.scheduler.running.values())
        self.scheduler.began(ticket, self.scheduler.version - age)

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: self.scheduler.cancelled)
    def come_back(self, number):
        assert self.scheduler.finished(rollout(self.ticket(number, self.scheduler.cancelled.values())))

    @rule()
    def learn(self):
        batch = self.scheduler.next_batch()
        assert batch is None or batch.step == self.scheduler.step - 1

    @rule()
    @precondition(lambda self: self.scheduler.version < self.scheduler.step)
    def publish(self):
        self.scheduler.published(self.scheduler.version + 1)

    @rule(most=st.integers(1, 14))
    def limit(self, most):
        self.scheduler.limit(most)

    @rule()
    def restore(self):
        """The state goes through JSON into a new scheduler."""
        self.look()
        rollouts = {event.rollout.id: event.rollout for event in self.log if isinstance(event, Finished)}
        state = json.loads(json.dumps(self.scheduler.state()))
        self.scheduler = Scheduler(self.config, TaskStream(self.sources))
        self.scheduler.restore(state, rollouts)
        assert self.scheduler.state() == state == fold(self.config, TaskStream(self.sources), self.log).state()

    @rule()
    def commit(self):
        self.look()
        self.committed = len(self.log)

    @rule()
    def crash(self):
        """What was not committed is lost."""
        self.log = self.log[: self.committed]
        self.scheduler, self.audit = Scheduler(self.config, TaskStream(self.sources)), Audit(self.config, self.sources)
        for event in self.log:
            self.scheduler.apply(event)
            self.audit.see(event)
        assert {t.id for t in self.scheduler.restarted()} == set(self.audit.running)

    @invariant()
    def look(self):
        events = self.scheduler.take_events()
        for event in events:
            self.audit.see(event)
        self.log += events
        self.audit.agrees(self.scheduler)

    @invariant()
    def no_deadlock(self):
        """When nothing is under way, something can be begun, learnt from or published."""
        it = self.scheduler
        if not it.running and not it.cancelled and it.version == it.step:
            copy = fold(self.config, TaskStream(self.sources), self.log, Scheduler)
            assert copy.admit() or copy.next_batch() or copy.take_events()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


MUTATIONS = {
    "no sweep before a batch": ("scheduler", "self._sweep()\n        chosen", "chosen"),
    "a bound that is one too wide": ("scheduler", "self.step - self.config.bound", "self.step - self.config.bound - 1"),
    "the age of the youngest token": ("scheduler_state", "[sample] = min(versions)", "[sample] = max(versions)"),
    "tried for ever": ("scheduler", "group.tries + 1 < attempts", "True"),
    "half is enough": ("repair", "2 * valid > group_size", "2 * valid >= group_size"),
    "the last are repeated": ("repair", "place < rest", "place >= len(valid) - rest"),
    "failures are scored": ("scheduler_state", "rollout.outcome not in SCORED", "False"),
    "no filter": ("scheduler", "if verdict is None:", "if True:"),
    "abstention is filtered": ("scheduler", "None if keep else ", ""),
    "one batch too many": ("admission", "published + 1 - step", "published + 2 - step"),
    "sampling before the weights": ("admission", "if published + config.bound < step:", "if False:"),
    "trained twice": ("scheduler_state", "self.groups.pop(selection.ticket.id)", "self.groups[selection.ticket.id]"),
    "a requeued task is lost": ("scheduler_state", "if again:\n", "if again and ticket.task_index % 2:\n"),
    "the cancelled hold no place": ("scheduler", "len(self.running) + len(self.cancelled) <", "len(self.running) <"),
    "speed is ignored": ("scheduler", "running[name] < limit", "True"),
    "the rest of a group runs on": ("scheduler", "self._emit(Cancelled(ticket, WITH_GROUP))", "pass"),
    "places are lost in a restart": ("scheduler_state", "self.cancelled.clear()", "pass"),
    "waits for one group more": ("scheduler", "len(accepted) < wanted", "len(accepted) <= wanted"),
    "a fate is forgotten": ("scheduler", "if sample not in group.settled:", "if sample in group.missing:"),
    "a change without an event": ("scheduler", "self._emit(Published(version))", "self.version = version"),
}  # fmt: skip


def mutant(monkeypatch, file, old, new):
    """The scheduler with one place of its source changed."""
    for name in dict.fromkeys((file, "scheduler_state", "scheduler")):
        spec = importlib.util.find_spec(f"glm5.rl.{name}")
        source = Path(spec.origin).read_text(encoding="utf-8")
        if name == file:
            assert source.count(old) == 1
            source = source.replace(old, new)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        exec(compile(source, spec.origin, "exec"), module.__dict__)
    return sys.modules["glm5.rl.scheduler"].Scheduler


def violent_runs(make):
    """Enough runs that a mistake shows."""
    sources = [TaskSource(environment="a", max_running=5), TaskSource(environment="b", uniform_groups="keep")]
    changes = {"groups_per_batch": 2, "group_size": 4, "max_running": 14, "max_attempts": 2}
    for seed in range(5):
        for mode in ({"mode": "sync"}, {"max_staleness": 1}, {"max_staleness": 0}):
            VirtualRun(SchedulerConfig(**mode, **changes), sources, seed, crashing=0.04, make=make).run(12, most=2000)


@pytest.mark.parametrize("name", MUTATIONS)
def test_these_tests_can_fail(name, monkeypatch):
    broken = mutant(monkeypatch, *MUTATIONS[name])
    with pytest.raises((AssertionError, RuntimeError, KeyError)):
        violent_runs(broken)


def test_unbroken_it_passes(monkeypatch):
    violent_runs(mutant(monkeypatch, "repair", "2 * valid > group_size", "2 * valid > group_size"))
