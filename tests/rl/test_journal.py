"""The journal: nothing that was appended is lost, what a crash tore off is cut, damage is refused."""

import pytest

from glm5.errors import RunError
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
