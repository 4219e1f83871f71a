"""Fates of rollouts, from events."""

from rollouts_made import rollout

from glm5.rl.events import BatchMade, Cancelled, Dropped, Finished, Requeued, Selection, Started
from glm5.rl.view import History, told
from glm5.rl.view.history import waiting


def test_every_finished_rollout_has_its_fate():
    rollouts = [rollout(sample) for sample in range(5)]
    tickets = [one.ticket for one in rollouts]
    never = rollout(9).ticket
    events = [
        *(Started(ticket, 0) for ticket in [*tickets, never]),
        *(Finished(one) for one in rollouts),
        Dropped(tickets[1], "stale"),
        Requeued(tickets[2], "group given up"),
        BatchMade(7, (Selection(tickets[0], ((0, 3), (4, 1))),)),
        Cancelled(never, "stale"),
        Dropped(never, "stale"),
    ]
    found = [
        (one.rollout.ticket.sample, one.fate, one.because, one.step, one.weight) for one in History().follow(events)
    ]
    assert found == [
        (0, "trained", "", 7, 3),
        (1, "dropped", "stale", None, 1),
        (2, "requeued", "group given up", None, 1),
        (3, "waiting", "", None, 1),
        (4, "trained", "", 7, 1),
    ]


def test_what_a_finished_run_has_not_learnt_from_is_dropped():
    rollouts = [rollout(sample) for sample in range(3)]
    events = [*map(Finished, rollouts), BatchMade(0, (Selection(rollouts[0].ticket, ((0, 1),)),))]
    events.append(Requeued(rollouts[1].ticket, "stale"))
    history = History().follow(events)
    assert waiting(events) == 1
    history.ended()
    found = [(one.fate, one.because) for one in history]
    assert found == [("trained", ""), ("requeued", "stale"), ("dropped", "the run ended")]


def test_recorded_rollouts_wait():
    assert [one.fate for one in told([rollout(), rollout(1)])] == ["waiting", "waiting"]


def test_of_a_long_run_the_newest_groups_are_kept():
    rollouts = [rollout(sample, index=index) for index in range(50) for sample in (1, 0)]
    each = told(rollouts)[0].tokens
    history = History(keep_tokens=6 * each)
    for one in rollouts:
        history.follow([Finished(one)])
    history.follow([Dropped(rollouts[0].ticket, "stale"), Dropped(rollouts[-1].ticket, "stale")])
    kept = [(one.rollout.ticket.task_index, one.rollout.ticket.sample, one.fate) for one in history]
    assert kept == [(47, 0, "waiting"), (47, 1, "waiting"), (48, 0, "waiting"), (48, 1, "waiting"),
                    (49, 0, "dropped"), (49, 1, "waiting")]  # fmt: skip
    assert history.finished == 100
