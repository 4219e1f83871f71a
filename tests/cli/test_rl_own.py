"""Environments of one's own, by their file: runs, resumes and replays know the code that they were begun with."""

import json
import os
import sys
from hashlib import sha256
from types import SimpleNamespace

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli.main import main
from glm5.cli.rl_environments import named_environment
from glm5.cli.rl_own import OwnFile
from glm5.cli.rl_record import Record
from glm5.errors import InputError, RunError
from glm5.rl.gateway import Sessions
from glm5.rl.records import Turn
from glm5.train.run_directory import directory_sha256

OWN = """
from dataclasses import dataclass

from glm5.envs import Sums, ToolEnvironment, single_questions


@dataclass(frozen=True)
class Kept:
    name: str


def long(task, message):
    return float(len(message["content"] or ""))


capitals = single_questions("capitals", [("Capital of France?", "Paris"), ("Capital of Peru?", "Lima")], long)


def drawn(split, largest=9):
    def pair(draw):
        return f"{draw.randrange(largest)}?", "1"

    return single_questions(f"drawn/{split}/{largest}", pair, long)


questions = Sums()


def missing():
    raise ValueError("no such table")


def leaves():
    raise SystemExit(0)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_an_object_or_a_function_that_makes_it(file):
    named = named_environment(f"python:{file}:capitals@2")
    assert (named.environment.name, named.weight, len(named.code)) == ("capitals", 2.0, 66)
    named = named_environment(f"python:{file}:drawn:largest=5", split="heldout")
    assert named.environment.name == "drawn/heldout/5"


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("none.py:capitals", r"There is no file '.*none\.py'"),
        ("mine.py:capitls", "has no 'capitls'; write python:.*Did you mean 'capitals'"),
        ("mine.py:capitals:largest=5", "is no function, so it takes no settings"),
        ("mine.py:questions", r"no limits and no uniform_groups and no episode; SingleTurn\(questions\)"),
        ("mine.py:drawn:smallest=5", "unexpected keyword argument 'smallest'"),
        ("mine.py:drawn:api_key=5", "looks like a secret"),
        ("broken.py:capitals", "cannot be read: ZeroDivisionError: division by zero"),
        ("script.py:capitals", r"script\.py cannot be read: SystemExit: 0"),
        ("mine.py:missing", r"missing of .*mine\.py made no environment: ValueError: no such table"),
        ("mine.py:leaves", r"leaves of .*mine\.py made no environment: SystemExit: 0"),
    ],
)
def test_what_is_refused_and_how(file, rest, says):
    (file.parent / "broken.py").write_text("1 / 0")
    (file.parent / "script.py").write_text(OWN + "raise SystemExit(0)")
    with pytest.raises(InputError, match=says):
        named_environment(f"python:{file.parent}/{rest}")


def test_the_code_that_runs_is_the_code_whose_hash_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path, seen = tmp_path / "edited.py", []
    for reward in ("1.0", "0.0"):  # of one size, in one second: a cache of bytecode would take them for the same
        path.write_text(
            OWN + f"capitals = single_questions('capitals', [('?', '!')], lambda task, message: {reward})\n"
        )
        os.utime(path, (1e9, 1e9))
        named = named_environment(f"python:{path}:capitals")
        score = named.environment.questions.score
        value = score(named.environment.task(0, 0), {"role": "assistant", "content": "x"}).value
        seen.append((named.code == f"2:{sha256(path.read_bytes()).hexdigest()}", value))
    assert seen == [(True, 1.0), (True, 0.0)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_import_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_mine.py").write_text("answer = 'Paris'\n")
    path = tmp_path / "with_neighbour.py"
    path.write_text("from neighbour_of_mine import answer\n" + OWN.replace('"Paris"', "answer"))
    task = named_environment(f"python:{path}:capitals").environment.task(0, 0)
    assert task.answer in ("Paris", "Lima")


def test_what_lies_beside_the_file_and_is_imported_is_part_of_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path, package = tmp_path / "importing.py", tmp_path / "own_package"
    package.mkdir()
    path.write_text("import json\nimport torch\nimport own_module_a as a\n" + OWN)
    assert OwnFile.read(str(path)).code == f"2:{sha256(path.read_bytes()).hexdigest()}"
    codes = []
    for file, text in [
        (tmp_path / "own_module_a.py", "from own_package.deep import answer\n"),
        (package / "__init__.py", ""),
        (package / "deep.py", "from .deeper import answer\n"),
        (package / "deeper.py", "answer = 1\n"),
        (package / "deeper.py", "answer = 2\n"),
        (tmp_path / "not_imported.py", "answer = 3\n"),
        (tmp_path / "json.py", "answer = 4\n"),  # Python's own is imported
    ]:
        file.write_text(text)
        codes.append(OwnFile.read(str(path)).code)
    assert len(set(codes)) == 5 and len(set(codes[4:])) == 1
    assert "own_module_a" not in sys.modules  # nothing ran
    named_environment(f"python:{path}:capitals")
    del sys.modules["own_module_a"]


def test_what_is_called_like_a_module_and_is_no_file_is_left_out(tmp_path):
    path, package = tmp_path / "importing.py", tmp_path / "own_locked"
    (package / "folder.py").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / ".#edited.py").symlink_to("somebody@somewhere.1234")  # as an editor locks a file
    path.write_text("import own_locked\n" + OWN)
    assert list(OwnFile.read(str(path)).beside) == ["own_locked/__init__.py"]


def test_a_neighbour_that_python_would_not_find_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own_helpers.py").write_text(f"answer = '{folder}'\n")
        (tmp_path / folder / "mine.py").write_text("from own_helpers import answer\n" + OWN)
    named_environment(f"python:{tmp_path}/one/mine.py:capitals")
    with pytest.raises(InputError, match=r"one/own_helpers.py before .*two/own_helpers.py; give the latter another"):
        named_environment(f"python:{tmp_path}/two/mine.py:capitals")
    (tmp_path / "torch.py").write_text("answer = 1\n")
    (tmp_path / "mine.py").write_text("import torch\n" + OWN)
    with pytest.raises(InputError, match=r"Python finds .*__init__.py before .*torch.py"):
        named_environment(f"python:{tmp_path}/mine.py:capitals")


@pytest.mark.parametrize("here", [True, False])
def test_a_neighbour_that_python_finds_first_is_imported(tmp_path, monkeypatch, here):
    folder, other = tmp_path / "own", tmp_path / "installed"
    for place, answer in ((folder, "Paris"), (other, "Oslo")):
        place.mkdir()
        (place / "own_shared.py").write_text(f"answer = '{answer}'\n")
    (other / "own_elsewhere.py").write_text("")
    (folder / "own_elsewhere").mkdir()  # no package, so Python goes on to the other place
    (folder / "own_elsewhere" / "data.py").write_text("")
    path = folder / "mine.py"
    path.write_text("import own_elsewhere\nfrom own_shared import answer\n" + OWN.replace('"Paris"', "answer"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["" if here else str(folder), str(other), *sys.path])
    task = named_environment(f"python:{path}:capitals").environment.task(0, 0)
    assert list(OwnFile.read(str(path)).beside) == ["own_shared.py"] and task.answer in ("Paris", "Lima")
    assert sys.modules.pop("own_shared").__file__ == str(folder / "own_shared.py")
    del sys.modules["own_elsewhere"]


def test_a_run_is_resumed_and_replayed_with_the_code_that_it_was_begun_with(file, tmp_path, capsys, monkeypatch):
    def resumed(steps, *more):
        args = ["rl", "--resume", "--out", str(tmp_path / "run"), "--steps", str(steps), "--threads", "1", "--json"]
        status = main([*args, *more])
        said = capsys.readouterr()
        return json.loads(said.out)["steps"] if status == 0 else said.err

    glm5.save_model(speaker_model(), tmp_path / "parent", speaker_tokenizer())
    monkeypatch.chdir(tmp_path)
    begin = ["rl", "--parent", str(tmp_path / "parent"), "--env", "python:mine.py:capitals", "--out", "run"]
    begin += [
        "--steps",
        "1",
        "--rollout.max-tokens",
        "4",
        "--scheduler.groups-per-batch",
        "1",
        "--scheduler.group-size",
        "2",
    ]
    begin += ["--uniform-groups", "keep", "--threads", "1", "--json"]
    assert main([*begin, "--held-out-env", "python:mine.py:capitals"]) == 1
    assert "would measure the tasks that it is learnt from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(begin) == 0
    capsys.readouterr()
    monkeypatch.chdir("/")
    assert resumed(2) == 2
    ran = tmp_path / "the changed file ran"
    file.write_text(OWN.replace("float(len", "-float(len") + f"open({str(ran)!r}, 'w').close()\n")
    for more in ((), ("--held-out-env", "none"), ("--held_out_env=sums",)):  # what is said again is another one
        assert "mine.py:capitals, or one beside it that it imports, has changed since" in resumed(3, *more)
    file.write_text("import resumed_neighbour\n" + OWN)
    (tmp_path / "resumed_neighbour.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    assert "or one beside it that it imports, has changed since" in resumed(3)
    assert not ran.exists()
    file.write_text(OWN.replace("float(len", "-float(len"))
    assert main(["rl", "--replay-step", "1", "--out", str(tmp_path / "run"), "--threads", "1"]) == 0
    capsys.readouterr()
    assert resumed(3, "--env", f"python:{file}:capitals") == 3
    assert resumed(4) == 4  # one of the files that it was learnt with


def test_a_run_of_an_earlier_version_noted_the_file_alone(file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    neighbour = tmp_path / "noted_neighbour.py"
    neighbour.write_text("answer = 1\n")
    file.write_text("import noted_neighbour\n" + OWN)
    spec = f"python:{file}:capitals"

    def record(*codes):
        """A run with what its sessions noted, the oldest first."""
        first, *later = [{"code": {spec: code}} for code in codes]
        sessions = [{"settings": {"command": command}} for command in later]
        run = SimpleNamespace(path="run", description={"sessions": sessions})
        return Record(run, SimpleNamespace(command=first))

    old = sha256(file.read_bytes()).hexdigest()
    read = OwnFile.read(str(file))
    record(old).check_code(spec, read)
    record(old, read.code).check_code(spec, read)
    neighbour.write_text("answer = 2\n")
    record(old).check_code(spec, OwnFile.read(str(file)))  # it is not known what was beside it
    with pytest.raises(RunError, match=r"the hash is 2:\w{10} now, but 2:\w{10} then"):
        record(old, read.code).check_code(spec, OwnFile.read(str(file)))
    file.write_text(OWN)
    with pytest.raises(RunError, match=f"now, but {old[:12]} then"):
        record(old).check_code(spec, OwnFile.read(str(file)))


def test_a_run_of_recorded_sessions_knows_the_code_that_it_measures_with(file, tmp_path, capsys):
    glm5.save_model(speaker_model(), tmp_path / "parent", speaker_tokenizer())
    sessions = Sessions(tmp_path / "records", weights=directory_sha256(tmp_path / "parent"))
    for number in range(2):
        session = sessions.open(f"s{number}")
        turn = Turn((1, 5), (2 + number, 3), (-0.5, -0.6), (0, 0), "stop")
        sessions._write(session.id, session.turn_event(turn, learnt=True))
        sessions.reward(session.id, float(number))
    sessions.close()
    out, measured = str(tmp_path / "run"), f"python:{file}:capitals"
    begin = ["rl", "--parent", str(tmp_path / "parent"), "--from-records", str(sessions.directory), "--out", out]
    begin += ["--scheduler.groups-per-batch", "1", "--scheduler.group-size", "2", "--held-out-env", measured]
    assert main([*begin, "--held-out.tasks", "1", "--threads", "1", "--json"]) == 0
    file.write_text(OWN + "\n")
    resume = ["rl", "--resume", "--out", out, "--threads", "1", "--json"]
    capsys.readouterr()
    assert main(resume) == 1
    refused = " ".join(capsys.readouterr().err.split())
    assert "mine.py:capitals, or one beside it that it imports, has changed since" in refused
    assert main([*resume, "--held_out_env", measured]) == 0
