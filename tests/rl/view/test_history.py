"""Fates of rollouts, from events."""

from rollouts_made import rollout

from glm5.rl.events import BatchMade, Cancelled, Dropped, Finished, Requeued, Selection, Started
from glm5.rl.view import history, told


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
    found = [(one.rollout.ticket.sample, one.fate, one.because, one.step, one.weight) for one in history(events)]
    assert found == [
        (0, "trained", "", 7, 3),
        (1, "dropped", "stale", None, 1),
        (2, "requeued", "group given up", None, 1),
        (3, "waiting", "", None, 1),
        (4, "trained", "", 7, 1),
    ]


def test_recorded_rollouts_wait():
    assert [one.fate for one in told([rollout(), rollout(1)])] == ["waiting", "waiting"]
