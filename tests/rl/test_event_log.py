"""Tokens of unfinished rollouts: each is written once, and all come back."""

import numpy as np

from glm5.engine import ExpertChoices
from glm5.rl.event_log import Unfinished, events_of, pieces_of, write_events, write_pieces
from glm5.rl.events import Cancelled, Finished, Started
from glm5.rl.journal import Journal, read_journal
from glm5.rl.records import Ticket, Turn, aborted

A, B = Ticket("env", 0), Ticket("env", 0, 0, 1)


def turn(count, finish="", name=10, prompt=(1, 2), told=0):
    """The tokens of an answer from `told` to `count`; the first token of the prompt is known to whoever asks."""
    ids = tuple(range(name + told, name + count))
    start = len(prompt) - 1 + told if told else 1
    experts = ExpertChoices.of(start, np.full((len(prompt) + count - 1 - start, 1, 2), name, np.uint8))
    return Turn(prompt, ids, tuple(-float(i) for i in ids), (3,) * len(ids), finish, experts=experts)


def test_reports_become_pieces_and_come_back(tmp_path):
    journal, live = Journal(tmp_path / "journal"), Unfinished()

    def report(*arguments):
        piece = live.news(*arguments)
        live.add(piece)
        write_pieces(journal, "progress", [piece], 0)
        return piece

    assert live.first_version(A) is None
    assert report(A, 0, 0, turn(2)).turn.output_ids == (10, 11)
    piece = report(A, 0, 2, turn(5, "stop", told=2))
    assert (piece.first, piece.turn.output_ids, piece.turn.prompt_ids) == (2, (12, 13, 14), ())
    assert (piece.turn.experts.start, piece.turn.experts.end) == (3, 6)
    report(B, 0, 0, turn(3))
    longer = (1, 2, 10, 11, 12, 13, 14, 7)
    report(A, 1, 0, turn(1, prompt=longer))
    assert list(live.turns(A)) == [turn(5, "stop"), turn(1, prompt=longer)] and live.first_version(A) == 3
    report(B, 0, 0, turn(2, name=50))  # began anew
    assert list(live.turns(B)) == [turn(2, name=50)]
    report(A, 0, 0, turn(1, name=60))
    assert list(live.turns(A)) == [turn(1, name=60)]
    journal.close()
    again = Unfinished()
    for record in read_journal(tmp_path / "journal"):
        for piece in pieces_of(record):
            again.add(piece)
    assert [list(again.turns(ticket)) for ticket in (A, B)] == [list(live.turns(ticket)) for ticket in (A, B)]
    again.forget([Finished(aborted(A)), Cancelled(B, "stale")])
    assert not len(again.turns(A)) and not len(again.turns(B)) and again.first_version(A) is None


def test_a_prompt_is_written_once_however_many_turns_repeat_it(tmp_path):
    journal, live = Journal(tmp_path / "journal"), Unfinished()
    prompt, sizes = tuple(range(500, 700)), []
    for number in range(12):
        ids = tuple(range(1000 + 100 * number, 1020 + 100 * number))
        told = Turn(prompt, ids, (-0.5,) * 20, (3,) * 20, "stop")
        piece = live.news(A, number, 0, told)
        live.add(piece)
        before = (tmp_path / "journal").stat().st_size
        write_pieces(journal, "progress", [piece], 0)
        sizes.append((tmp_path / "journal").stat().st_size - before)
        prompt = (*prompt, *told.output_ids, 7, 8)
        if number == 5:
            prompt = prompt[:250] + prompt[300:]  # a history that was compacted
    assert max(sizes[1:6] + sizes[7:]) < 1.1 * min(sizes[1:6] + sizes[7:]) < 1.1 * sizes[0]
    journal.close()
    again = Unfinished()
    for record in read_journal(tmp_path / "journal"):
        for piece in pieces_of(record):
            again.add(piece)
    assert list(again.turns(A)) == list(live.turns(A)) and list(again.turns(A))[-1].prompt_ids == told.prompt_ids


def test_events_of_one_call_are_one_line(tmp_path):
    journal = Journal(tmp_path / "journal")
    events = [Started(A, 4), Finished(aborted(A)), Cancelled(B, "stale")]
    write_events(journal, events, 9)
    write_events(journal, [], 9)
    journal.close()
    [record] = read_journal(tmp_path / "journal")
    assert record["tick"] == 9 and events_of(record) == events and pieces_of(record) == []
