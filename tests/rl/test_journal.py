"""The journal: nothing that was appended is lost, what a crash tore off is cut, damage is refused."""

import errno
import os

import pytest
from scripted import FullDisk

from glm5.errors import RunError
from glm5.rl import journal as journal_file
from glm5.rl.gateway import Sessions
from glm5.rl.journal import Journal, read_journal


def written(path, *numbers):
    journal = Journal(path)
    for number in numbers:
        journal.append({"kind": "note", "n": number, "text": "a\nb ü"})
    journal.close()
    return path


def test_events_come_back_in_order_over_sessions(tmp_path):
    path = written(tmp_path / "journal", 1, 2)
    written(path, 3)
    assert [record["n"] for record in read_journal(path)] == [1, 2, 3]
    assert next(read_journal(path))["text"] == "a\nb ü"
    assert list(read_journal(tmp_path / "none")) == []


def test_a_journal_is_read_once_when_it_is_opened_and_told_again(tmp_path, monkeypatch):
    path, seen, looked = written(tmp_path / "journal", 1, 2, 3), [], []
    number = journal_file._number
    monkeypatch.setattr(journal_file, "_number", lambda line: (looked.append(line), number(line))[1])
    journal = Journal(path, seen.append)
    assert [record["n"] for record in seen] == [1, 2, 3] and journal.count == 3
    assert len(looked) == 3 and not journal.close()
    looked.clear()
    assert len(list(read_journal(path))) == len(looked) == 3


def test_a_line_that_is_being_written_is_the_end(tmp_path):
    path = written(tmp_path / "journal", 1, 2, 3)
    ends = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(ends[:2]) + ends[2][:9])
    records = read_journal(path)
    assert next(records)["n"] == 1
    assert [record["n"] for record in records] == [2]


def test_a_torn_end_is_cut_at_every_byte(tmp_path):
    whole = written(tmp_path / "whole", 1, 2, 3).read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        path = tmp_path / "torn"
        path.write_bytes(whole[:size])
        lines = sum(end <= size for end in ends)
        assert [record["n"] for record in read_journal(path)] == [1, 2, 3][:lines]
        written(path, *[1, 2, 3][lines:])
        assert path.read_bytes() == whole


def test_garbage_after_a_power_cut_is_cut(tmp_path):
    path = written(tmp_path / "journal", 1, 2)
    with open(path, "ab") as file:
        file.write(b"\0" * 5000 + b"\n" + b"12345678 2 {}\n")
    written(path, 3)
    assert [record["n"] for record in read_journal(path)] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["flip", "lose", "double"])
def test_damage_in_the_middle_is_refused(tmp_path, damage):
    path = written(tmp_path / "journal", 1, 2, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1:2] = {"flip": [lines[1].replace(b'"n":2', b'"n":7')], "lose": [], "double": [lines[1]] * 2}[damage]
    path.write_bytes(b"".join(lines))
    for use in (lambda: list(read_journal(path)), lambda: Journal(path)):
        with pytest.raises(RunError, match="restore the file from a copy, or start a new run"):
            use()
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("takes", [0, 1, 9, 30])
def test_a_line_that_the_disk_takes_in_part_is_taken_back_and_none_follows(tmp_path, monkeypatch, takes):
    path = written(tmp_path / "journal", 1, 2)
    whole, journal = path.read_bytes(), Journal(path)
    disk = FullDisk(monkeypatch, takes)
    for use in (lambda: journal.append({"n": 3, "kind": "note"}), lambda: journal.append({"n": 4}), journal.commit):
        with pytest.raises(RunError, match=r"The disk refused to write in .*journal .No space left on device.*resume"):
            use()
        disk.free()  # too late: what comes next belongs behind what is lost
    journal.close()
    assert path.read_bytes() == whole
    written(path, 3)
    assert [record["n"] for record in read_journal(path)] == [1, 2, 3]


def test_a_line_that_takes_several_writes_is_whole(tmp_path, monkeypatch):
    journal, write = Journal(tmp_path / "journal"), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    journal.append({"n": 1, "kind": "note"})
    journal.close()
    assert list(read_journal(tmp_path / "journal")) == [{"n": 1, "kind": "note"}]


def test_an_interruption_between_two_writes_tears_nothing(tmp_path, monkeypatch):
    journal, write = Journal(tmp_path / "journal"), os.write
    journal.append({"n": 1})

    def interrupted(file, data):
        write(file, data[:7])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        journal.append({"n": 2})
    monkeypatch.undo()
    with pytest.raises(RunError, match="it was interrupted"):
        journal.append({"n": 3})
    journal.close()
    assert [record["n"] for record in read_journal(tmp_path / "journal")] == [1]


def test_what_the_disk_does_not_keep_is_refused(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal")
    journal.append({"n": 1})

    def failing(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    for use in (journal.commit, journal.commit, lambda: journal.append({"n": 2})):
        with pytest.raises(RunError, match="Input/output error"):
            use()
    journal.close()


def test_a_session_whose_disk_is_full_is_whole_for_the_next_process(tmp_path, monkeypatch):
    sessions = Sessions(tmp_path)
    sessions.open("a")
    sessions.open("b")
    disk = FullDisk(monkeypatch, takes=20)
    with pytest.raises(RunError, match=r"The disk refused to write in .*a.jsonl"):
        sessions.reward("a", 1.0)
    disk.free()
    sessions.reward("b", 0.5)
    sessions.close()
    again = Sessions(tmp_path)
    assert [session.id for session in again.going_on()] == ["a"] and again.find("b").reward.value == 0.5
    assert again.reward("a", 1.0).state == "finished"
    again.close()
