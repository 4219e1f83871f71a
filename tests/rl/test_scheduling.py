"""The scheduler by hand: each rule once. What holds for all runs is in test_scheduler_properties.py."""

import json

import pytest
from thin_rollouts import fold, one_environment, rollout, scheduler

from glm5.errors import ConfigError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.events import EVENTS, Cancelled
from glm5.rl.records import Ticket
from glm5.rl.scheduler import Scheduler
from glm5.rl.tasks import Pools


def config(mode="async", **changes):
    """Two groups of four a batch."""
    return SchedulerConfig(**({"mode": mode, "groups_per_batch": 2, "group_size": 4, "max_staleness": 2} | changes))


def finish(it, tickets, **kind):
    for ticket in tickets:
        assert it.finished(rollout(ticket, **kind))


def cancelled(it):
    return [event.ticket for event in it.take_events() if isinstance(event, Cancelled)]


def test_a_sample_with_a_reward_and_no_token_counts_in_no_baseline():
    it = scheduler(config(groups_per_batch=1))
    tickets = it.admit()[:4]
    finish(it, tickets[:1], versions=(), reward=9.0)
    finish(it, tickets[1:])
    (group,) = it.next_batch().groups
    assert group.rewards == [1.0, 1.0, 0.0, 1.0]  # the second stands for the first
    assert it.accounts.metrics()["dropped"] == {"no token to learn from": 1}


def test_sync_samples_a_batch_learns_from_it_and_waits_for_the_weights():
    it = scheduler(config("sync"))
    tickets = it.admit()
    assert tickets == [Ticket("e", task, 0, sample) for task in (0, 1) for sample in range(4)]
    finish(it, reversed(tickets[1:]))
    assert it.next_batch() is None and it.admit() == [] and not it.swappable
    finish(it, tickets[:1])
    batch = it.next_batch()
    assert batch.step == batch.version == 0
    assert [group.ticket.task_index for group in batch.groups] == [0, 1], "in the order of the tasks, not of the clock"
    assert it.swappable and it.admit() == [] and it.next_batch() is None
    it.published(1)
    assert it.admit()[0] == Ticket("e", 2)


def test_one_step_off_samples_while_it_learns():
    it = scheduler(config("one-step-off"))
    finish(it, it.admit())
    assert it.next_batch().step == 0
    second = it.admit()
    assert len(second) == 8 and not it.swappable
    finish(it, second)
    assert it.next_batch().step == 1
    assert it.admit() == [], "weights 0 would be two versions old in step 2"
    it.published(1)
    assert len(it.admit()) == 8


def test_async_runs_ahead_by_the_bound_and_no_further():
    it = scheduler(config(max_running=1000))
    tickets = it.admit()
    assert len(tickets) == 3 * 2 * 4  # (S + v + 1) * B groups of 4
    finish(it, tickets[:8])
    assert it.next_batch().step == 0 and it.admit() == []
    it.published(1)
    assert len(it.admit()) == 8


def test_the_oldest_groups_are_learnt_from_first():
    it = Scheduler(config(max_running=1000), one_environment(), version=5)
    tickets = it.admit()
    for task, version in enumerate((5, 4, 5, 3)):
        finish(it, tickets[4 * task : 4 * task + 4], versions=(5, version, 5))
    assert [group.ticket.task_index for group in it.next_batch().groups] == [3, 1]


def test_the_sweep_takes_out_what_became_too_old_and_repairs_the_group():
    it = scheduler(config(max_staleness=1, groups_per_batch=1, max_running=1000))
    first, second = it.admit()[:4], it.admit() or [Ticket("e", 1, 0, s) for s in range(4)]
    finish(it, first)
    finish(it, second[:1], versions=(0, 1))
    finish(it, second[1:], versions=(1,))
    it.next_batch()
    it.published(1)
    assert {group.ticket.task_index for group in [*it.groups.values()]} == {1}
    it.step = 2  # as if another batch had been made
    batch = it.next_batch()
    assert [(lesson.rollout.ticket.sample, lesson.weight) for lesson in batch.groups[0].lessons] == [
        (1, 2), (2, 1), (3, 1)]  # fmt: skip
    assert it.accounts.metrics()["dropped"] == {"stale": 1}


def test_what_is_left_after_the_sweep_must_still_teach():
    it = scheduler(config(groups_per_batch=1, max_staleness=0, group_size=4))
    finish(it, it.admit()[:1], reward=1.0, versions=(-1,))  # engines that lag: older than what was published
    for sample in (1, 2, 3):
        it.finished(rollout(Ticket("e", 0, 0, sample), reward=0.0))
    assert len(it.groups) == 1 and it.next_batch() is None and not it.groups
    assert it.accounts.metrics()["dropped"] == {"all wrong": 3, "stale": 1}


def test_a_failure_is_repaired_or_tried_again_and_not_for_ever():
    it = scheduler(config("sync", groups_per_batch=1, max_attempts=2))
    tickets = it.admit()
    finish(it, tickets[:1], outcome="env_failure")
    finish(it, tickets[1:])
    assert [(x.rollout.ticket.sample, x.weight) for x in it.next_batch().groups[0].lessons] == [(1, 2), (2, 1), (3, 1)]
    it.published(1)

    tickets = it.admit()
    finish(it, tickets[:2], outcome="timeout")
    assert cancelled(it) == tickets[2:], "exactly half is not enough, whatever becomes of the rest"
    assert it.next_batch().groups == () and len(it.cancelled) == 2
    it.published(2)
    finish(it, tickets[2:], outcome="aborted")
    again = it.admit()
    assert again[0] == Ticket("e", 1, attempt=1) and not it.cancelled
    finish(it, again[:2], outcome="env_failure")
    assert it.accounts.metrics() == {
        "sampled": 12, "trained": 3, "requeued": {"timeout": 2, "group given up": 2},
        "dropped": {"env_failure": 3, "group given up": 2}}  # fmt: skip


def test_without_repair_one_failure_gives_up_the_group():
    it = scheduler(config("sync", repair="never"))
    tickets = it.admit()
    finish(it, tickets[:1], outcome="env_failure")
    assert cancelled(it) == tickets[1:4] and it.again[0].ticket == Ticket("e", 0, attempt=1)


def test_uniform_groups_are_dropped_but_not_hidden_from_abstention():
    it = scheduler(config("sync"))
    tickets = it.admit()
    finish(it, tickets[:4], reward=0.0)
    finish(it, tickets[4:], reward=1.0)
    assert it.next_batch().groups == ()
    assert it.accounts.metrics()["dropped"] == {"all wrong": 4, "all right": 4}

    it = scheduler(config("sync"), uniform_groups="keep")
    finish(it, it.admit(), reward=0.0)
    assert [group.rewards for group in it.next_batch().groups] == [[0.0] * 4] * 2


def test_refill_replaces_what_is_not_learnt_from():
    it = scheduler(config("sync", refill=True))
    tickets = it.admit()
    finish(it, tickets[:4], reward=1.0)
    finish(it, tickets[4:])
    assert it.next_batch() is None
    finish(it, it.admit())
    assert [group.ticket.task_index for group in it.next_batch().groups] == [1, 2]


def test_what_runs_in_vain_is_called_off():
    it = scheduler(config(max_staleness=0, groups_per_batch=1, max_running=8))
    finish(it, it.admit())
    assert it.next_batch() is not None
    it.published(1)
    tickets = it.admit()
    for ticket in tickets[:3]:
        it.began(ticket, 0)  # an engine that has not heard of version 1
    it.began(tickets[3], 1)
    it.take_events()
    it.published(1)
    assert cancelled(it) == tickets
    assert [waiting.ticket for waiting in it.again] == [Ticket("e", 1, attempt=1)]


@pytest.mark.parametrize(("stale", "fate"), [("requeue", "requeued"), ("drop", "dropped")])
def test_the_tasks_of_stale_groups_go_back_or_not(stale, fate):
    it = scheduler(config(max_staleness=0, stale=stale))
    finish(it, it.admit(), versions=(-1,))
    assert it.next_batch() is None
    assert it.accounts.metrics()[fate] == {"stale": 8} and bool(it.again) == (stale == "requeue")


def test_a_second_delivery_changes_nothing():
    it = scheduler(config())
    ticket = it.admit()[0]
    assert it.finished(rollout(ticket)) and not it.finished(rollout(ticket))
    assert not it.finished(rollout(Ticket("e", 99)))


def test_speed_and_places():
    it = scheduler(config(max_running=6), max_running=5)
    assert len(it.admit()) == 5
    it = scheduler(config(max_running=6))
    assert len(it.admit()) == 6
    it.limit(7)
    assert it.admit() == [Ticket("e", 1, 0, 2)]


def test_the_events_as_json_give_the_same_state():
    it = scheduler(config(max_attempts=2))
    log = []
    for reward in (0.1 + 0.2, 0.0, 1e-17):
        for ticket in it.admit():
            it.began(ticket, it.version)
            it.finished(
                rollout(ticket, (it.version,), reward * ticket.sample, ("ok", "env_failure")[ticket.sample == 3])
            )
        while it.next_batch():
            it.published(it.step)
        log += it.take_events()
    it.limit(3)
    log += it.take_events()
    again = fold(it.config, one_environment(), [EVENTS.validate_json(EVENTS.dump_json(event)) for event in log])
    assert again.state() == it.state() == json.loads(json.dumps(it.state()))


def test_a_batch_needs_enough_different_tasks():
    with pytest.raises(ConfigError, match="lower groups_per_batch"):
        scheduler(config(groups_per_batch=9), pools=Pools(size=8))
    with pytest.raises(RuntimeError, match="cannot follow"):
        scheduler(config()).published(1)
