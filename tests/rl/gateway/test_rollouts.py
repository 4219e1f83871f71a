"""Closed sessions fill the scheduler's tickets: whole groups, in order, each session once, also after a crash."""

import asyncio
import gc
import os
import time

import pytest
from gateway_tools import add_turn

from glm5.rl.event_log import write_events
from glm5.rl.events import Finished
from glm5.rl.gateway import FinishedSessions, Sessions, reading
from glm5.rl.gateway.rollouts import GatewayRollouts, sessions_had
from glm5.rl.journal import Journal
from glm5.rl.records import Ticket, Turn


def tickets(index, samples=range(2)):
    return [Ticket("gateway", index, 0, sample) for sample in samples]


def close(sessions, name, group=None):
    session = sessions.open(name, group=group)
    sessions._write(name, session.turn_event(Turn((1,), (2,), (-0.5,), (0,), "stop"), learnt=True))
    sessions.reward(name, 1.0)


def ids(ready):
    return [rollout.task.id for rollout in ready.rollouts]


async def played(rollouts, wanted, looks=3):
    """What comes for the tickets within so many looks at the directory, by ticket."""
    looked, poll = [], rollouts.finished.poll
    rollouts.finished.poll = lambda: (looked.append(1), poll())[1]
    tasks = {ticket: asyncio.create_task(rollouts.play(ticket)) for ticket in wanted}
    while len(looked) < looks and not all(task.done() for task in tasks.values()):
        await asyncio.sleep(0.01)
    rollouts.finished.poll = poll
    done = {ticket: task.result() for ticket, task in tasks.items() if task.done()}
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    return done


@pytest.fixture
def sessions(tmp_path):
    found = Sessions(tmp_path / "sessions")
    yield found
    found.close()


def test_a_group_is_given_whole_and_in_the_order_of_becoming_complete(sessions, tmp_path):
    for name, group in [("a", "g"), ("b", "h"), ("c", "h"), ("d", "g"), ("e", "i")]:
        close(sessions, name, group)
    rollouts = GatewayRollouts(FinishedSessions(sessions.directory, 2))
    done = asyncio.run(played(rollouts, [*tickets(0), *tickets(1), *tickets(2)]))
    assert {t: r.task.id for t, r in done.items()} == dict(
        zip([*tickets(0), *tickets(1)], ["b", "c", "a", "d"], strict=True)
    )
    assert all(rollout.ticket == ticket for ticket, rollout in done.items())
    close(sessions, "f", "i")
    assert [r.task.id for r in asyncio.run(played(rollouts, tickets(2))).values()] == ["e", "f"]


def test_sessions_of_many_turns_hold_no_more_than_their_tokens_until_they_are_learnt_from(sessions):
    there = lambda: {id(it): it for it in gc.get_objects() if type(it) is Turn}
    before, prompt, turns = there(), (1, 2), []
    held = lambda: sum(len(turn.prompt_ids) for place, turn in there().items() if place not in before)
    for number in range(60):
        turns.append(Turn(prompt, (5, 6), (-0.5, -0.5), (0, 0), "stop"))
        prompt = (*prompt, 5, 6, 7, 8) if number % 10 else (*prompt[:-2], 9, 8)  # some drop a part
    before |= there()
    for name in "ab":
        sessions.open(name, group="g")
        for turn in turns:
            sessions._write(name, sessions.find(name).turn_event(turn, learnt=True))
    assert held() < 4 * len(prompt)
    assert [recorded.turn for recorded in sessions.find("a").turns] == turns
    for name in "ab":
        sessions.reward(name, 1.0)
    before |= there()
    (ready,) = FinishedSessions(sessions.directory, 2).poll()
    assert held() < 4 * len(prompt)
    assert [rollout.turns for rollout in ready.rollouts] == [tuple(turns)] * 2


def test_a_group_with_a_place_missing_is_not_filled(sessions, tmp_path):
    for name in "ab":
        close(sessions, name)
    rollouts = GatewayRollouts(FinishedSessions(sessions.directory, 2))
    assert asyncio.run(played(rollouts, tickets(0)[:1])) == {}
    assert len(asyncio.run(played(rollouts, tickets(1)))) == 2


@pytest.mark.parametrize("deleted", ["", "a", "c"])
def test_a_torn_group_goes_on_where_it_was_torn_and_no_session_comes_twice(sessions, tmp_path, deleted):
    for name in "abcdefgh":
        close(sessions, name, "g" if name < "e" else "h")
    first = GatewayRollouts(FinishedSessions(sessions.directory, 4))
    done = asyncio.run(played(first, tickets(0, range(4))))
    journal = Journal(tmp_path / "journal")
    write_events(journal, [Finished(done[ticket]) for ticket in tickets(0, (0, 2))], 0)
    journal.close()
    had = sessions_had(tmp_path / "journal")
    assert had == {"a": tickets(0)[0], "c": tickets(0, (2,))[0]}
    if deleted:
        next(sessions.finished.glob(f"*-{deleted}.jsonl")).unlink()
    again = GatewayRollouts(FinishedSessions(sessions.directory, 4, had=had))
    done = asyncio.run(played(again, [*tickets(0, (1, 3)), *tickets(1, range(4))]))
    assert [done[ticket].task.id for ticket in [*tickets(0, (1, 3)), *tickets(1, range(4))]] == list("bdefgh")


def test_a_damaged_record_is_named_and_left_out(sessions, caplog):
    close(sessions, "a")
    close(sessions, "b")
    path = sessions.finished / "00000000-a.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"x" + lines[1], *lines[2:]]))
    cut = sessions.finished / "00000002-c.jsonl"
    cut.write_bytes(lines[0])
    finished = FinishedSessions(sessions.directory, 1)
    done = asyncio.run(played(GatewayRollouts(finished), [*tickets(0, (0,)), *tickets(1, (0,))]))
    assert [rollout.task.id for rollout in done.values()] == ["b"]
    assert finished.damaged == [path.name, cut.name] and finished.left_out == "2 cannot be read"
    assert f"{path} is damaged at line 2" in caplog.text and f"{cut} ends before its session was closed" in caplog.text


def test_deleted_sessions_that_a_run_has_had_do_not_shift_the_groups_of_others(sessions, tmp_path):
    for name in "abcdef":
        close(sessions, name)
    had = {"a": tickets(0)[0], "b": tickets(0)[1]}
    next(sessions.finished.glob("*-a.jsonl")).unlink()
    finished = FinishedSessions(sessions.directory, 2, had=had)
    assert [ids(ready) for ready in finished.poll()] == [["c", "d"], ["e", "f"]] and finished.waiting == 0


def test_sessions_that_a_run_has_had_are_not_said_to_be_left_out(sessions):
    """Those of a run that an earlier version began name their weights as that one did."""
    for name in "abcd":
        close(sessions, name)
    path = next(sessions.finished.glob("*-a.jsonl"))
    path.write_bytes(b"x" + path.read_bytes())
    had = {"a": tickets(0)[0], "b": tickets(0)[1], "c": tickets(1)[0]}
    finished = FinishedSessions(sessions.directory, 2, "w", had=had)
    assert list(finished.poll()) == [] and finished.damaged == []
    assert [other.session_id for other in finished.others] == ["d"]


def test_a_directory_in_which_nothing_changed_is_not_listed_again(sessions, monkeypatch):
    monkeypatch.setattr(reading, "SETTLED", 0)
    listed, listdir = [], os.listdir
    monkeypatch.setattr(reading.os, "listdir", lambda path: (listed.append(path), listdir(path))[1])
    finished = FinishedSessions(sessions.directory, 2)
    close(sessions, "a")
    assert list(finished.poll()) == list(finished.poll()) == [] and finished.waiting == 1 and len(listed) == 1
    time.sleep(0.02)
    close(sessions, "b")
    assert [ids(ready) for ready in finished.poll()] == [["a", "b"]] and len(listed) == 2


def test_a_change_right_before_a_look_is_looked_for_again(sessions):
    finished = FinishedSessions(sessions.directory, 1)
    for name in "abc":  # however coarse the clock of the file system is
        close(sessions, name)
        assert [ids(ready) for ready in finished.poll()] == [[name]]


def test_closed_sessions_become_groups_in_the_order_of_closing(tmp_path):
    sessions = Sessions(tmp_path, weights="w1")
    finished = FinishedSessions(tmp_path, 2, weights="w1")
    for name, group in [("a", "g"), ("b", "h"), ("c", "g"), ("d", None), ("e", None), ("f", "g"), ("g", "g")]:
        sessions.open(name, group=group)
        add_turn(sessions, name)
    sessions.reward("b", 1.0)
    sessions.reward("c", 0.0)
    assert list(finished.poll()) == [] and finished.waiting == 2
    for name in "adefg":
        sessions.abandon(name, "") if name == "d" else sessions.reward(name, 1.0)
    groups = list(finished.poll())
    assert [[r.task.id for r in ready.rollouts] for ready in groups] == [["c", "a"], ["f", "g"]]
    groups = [ready.rollouts for ready in groups]
    assert [group[0].task.category for group in groups] == ["g", "g"]
    assert [group[0].ticket for group in groups] == [Ticket("gateway", 1), Ticket("gateway", 1, 1)]
    assert finished.waiting == 2 and finished.left_out == "1 name no group and have no reward"
    assert [ready.rollouts for ready in FinishedSessions(tmp_path, 2, weights="w1").poll()] == groups
    other = FinishedSessions(tmp_path, 2, weights="w2")
    assert list(other.poll()) == [] and len(other.others) == 7
    sessions.close()


def test_sessions_that_nobody_rewarded_do_not_spoil_the_groups_of_those_that_somebody_did(sessions):
    """Of a named group they are attempts at its task, and have their places: others may never come."""
    finished = FinishedSessions(sessions.directory, 2)
    for number in range(12):
        for group in (None, "g"):
            name = f"{group}{number}"
            if number % 3 == 2:
                close(sessions, name, group)
            else:
                sessions.open(name, group=group)
                add_turn(sessions, name)
                sessions.abandon(name, "Nobody said a word.")
    groups = list(finished.poll())
    real = [ready for ready in groups if ready.rollouts[0].task.category == "gateway"]
    assert [ids(ready) for ready in real] == [["None2", "None5"], ["None8", "None11"]]
    assert len(groups) == 8 and finished.waiting == 0 and finished.unrewarded == 8
