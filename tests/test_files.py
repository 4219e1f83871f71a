"""Files and directories are whole or absent: a failing block, a failing rename, what killed processes left."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm5.data.manifest import note_file, read_manifest
from glm5.errors import RunError
from glm5.files import locked, replacing, replacing_directory, restore_directory, sha256_of, write_json


def write(directory: Path, text: str) -> Path:
    with replacing_directory(directory) as beside:
        (beside / "a").write_text(text)
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"é": 1})
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"half", "not bytes"])
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert names(tmp_path) == ["x.json"]


HOLDER = """
import sys, time
from pathlib import Path
from glm5.files import locked
lock = locked(Path(sys.argv[1]), "taken")
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_keeps_other_processes_out_until_its_holder_is_gone(tmp_path):
    path = tmp_path / "lock"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True, env=env) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="somebody is in"):
            locked(path, "somebody is in")
        holder.kill()
    locked(path, "somebody is in").close()
    locked(path, "somebody is in").close()
    with pytest.raises(OSError, match="No such file"):
        locked(tmp_path / "nowhere" / "lock", "somebody is in")


@pytest.mark.skipif(os.name != "posix", reason="there is no fork")
def test_a_forked_child_neither_keeps_a_lock_nor_lets_it_go(tmp_path):
    lock = locked(tmp_path / "lock", "somebody is in")
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.read(heard, 1)
            lock.close()
        finally:
            os._exit(0)
    other = os.fork()
    if other == 0:
        try:
            lock.close()
        finally:
            os._exit(0)
    os.waitpid(other, 0)
    with pytest.raises(RunError, match="somebody is in"):
        locked(tmp_path / "lock", "somebody is in")
    lock.close()
    locked(tmp_path / "lock", "somebody is in").close()  # though the first child lives, with the file open
    os.write(told, b".")
    os.waitpid(child, 0)
    for end in (heard, told):
        os.close(end)


def test_a_directory_stays_when_the_block_fails(tmp_path):
    write(tmp_path / "d", "earlier")
    with pytest.raises(IsADirectoryError), replacing_directory(tmp_path / "d") as beside:
        beside.write_text("a file")
    assert (tmp_path / "d" / "a").read_text() == "earlier"
    assert names(tmp_path) == ["d"]


@pytest.mark.parametrize("broken", [1, 2])
def test_a_directory_stays_when_a_rename_fails(broken, tmp_path, monkeypatch):
    write(tmp_path / "d", "earlier")
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == broken:
            raise OSError("device went away")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="device went away"):
        write(tmp_path / "d", "new")
    assert (tmp_path / "d" / "a").read_text() == "earlier"
    assert names(tmp_path) == ["d"]


def test_the_new_directory_takes_the_place_of_the_old_one_and_a_link_stays_a_link(tmp_path):
    write(tmp_path / "real" / "d", "earlier")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "d")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "d" / "a").read_text() == "new"
    assert names(tmp_path / "real") == ["d"]


def test_a_file_is_no_directory_to_replace(tmp_path):
    (tmp_path / "d").write_text("a file")
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "d", "new")
    assert (tmp_path / "d").read_text() == "a file"
    assert names(tmp_path) == ["d"]


def test_the_next_write_removes_what_killed_processes_left_and_nothing_else(tmp_path):
    mine = [f".d.{os.getpid()}.partial", ".d.1.partial", ".d.old"]
    others = [".d.fp8.1.partial", ".d.fp8.old", ".e.1.partial"]
    for name in (*mine, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    (tmp_path / "d").mkdir()
    write(tmp_path / "d", "new")
    assert names(tmp_path) == sorted(["d", *others])
    assert names(tmp_path / "d") == ["a"]


def test_a_directory_that_waits_aside_gets_its_name_back(tmp_path):
    write(tmp_path / "d", "earlier").rename(tmp_path / ".d.old")
    restore_directory(tmp_path / "d")
    assert (tmp_path / "d" / "a").read_text() == "earlier"
    (tmp_path / "d").rename(tmp_path / ".d.old")
    with pytest.raises(RuntimeError), replacing_directory(tmp_path / "d"):
        raise RuntimeError
    assert (tmp_path / "d" / "a").read_text() == "earlier"
    assert names(tmp_path) == ["d"]


def test_a_directory_in_place_wins_over_one_aside(tmp_path):
    write(tmp_path / "d", "new")
    write(tmp_path / ".d.old", "earlier")
    restore_directory(tmp_path / "d")
    assert (tmp_path / "d" / "a").read_text() == "new"


def test_a_reader_of_manifests_restores_too(tmp_path):
    directory = write(tmp_path / "d", "x")
    write_json(directory / "manifest.json", {"kind": "toy", "files": {"a": note_file(directory / "a")}})
    directory.rename(tmp_path / ".d.old")
    assert read_manifest(directory, "toy")["kind"] == "toy"
