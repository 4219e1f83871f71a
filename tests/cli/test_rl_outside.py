"""`glm5 rl --from-records` and `--from-gateway` from the command line."""

import json
import shutil
import socket
import threading

import httpx
import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli.main import main
from glm5.engine import Engine, SamplingParams
from glm5.rl.gateway import Sessions
from glm5.rl.learner import Learner
from glm5.rl.records import Turn
from glm5.train.run_directory import directory_sha256


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


@pytest.fixture
def records(parent, tmp_path):
    """Four sessions of real tokens, two of them good."""
    return recorded(parent, tmp_path / "records", [True] * 4)


def recorded(parent, directory, learnt, group=None):
    """One session for each of `learnt`, which says whether its tokens count."""
    sessions = Sessions(directory, weights=directory_sha256(parent))
    (output,) = Engine(parent).generate([[40, 41]], SamplingParams(n=len(learnt), max_tokens=5, seed=0))
    for number, said in enumerate(output.outputs):
        session = sessions.open(f"s{number}", group=group)
        turn = Turn((40, 41), said.token_ids, said.logprobs, said.versions, said.finish_reason)
        sessions._write(session.id, session.turn_event(turn, learnt=learnt[number]))
        sessions.reward(session.id, float(number % 2))
    sessions.close()
    return sessions.directory


def flags(parent, out, *more):
    return ["rl", "--parent", str(parent), "--out", str(out), "--scheduler.groups-per-batch", "1",
            "--scheduler.group-size", "4", "--threads", "1", "--json", *map(str, more)]  # fmt: skip


def test_records_become_a_model(parent, records, tmp_path, capsys):
    assert main(flags(parent, tmp_path / "run", "--from-records", records)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["steps"], result["reward_first_fifth"]) == (1, 0.5)
    before, after = (glm5.load_model(d).state_dict() for d in (parent, result["model"]))
    assert any(not (tensor == before[name]).all() for name, tensor in after.items())


def test_sessions_without_a_token_of_the_policy_are_dropped_and_said(parent, tmp_path, capsys):
    cold = recorded(parent, tmp_path / "cold", [False] * 4)
    assert main(flags(parent, tmp_path / "run", "--from-records", cold)) == 1
    heard = " ".join(capsys.readouterr().err.split())
    assert "gives no batch" in heard and "4 hold no token that can be learnt from" in heard
    mixed = recorded(parent, tmp_path / "mixed", [True, False, True, True], group="ticket")
    assert main(flags(parent, tmp_path / "run", "--from-records", mixed)) == 0
    heard = capsys.readouterr()
    assert "of the closed sessions, 1 hold no token that can be learnt from" in heard.err
    result = json.loads(heard.out)
    assert result["trained"] == 3 and result["dropped"] == {"no token to learn from": 1}
    assert 0 < result["trained_tokens"] <= 15
    assert result["reward_first_fifth"] == 0.25  # 0, 0, 1 and the first of them once more: the 1 of the fourth is away


def test_sessions_of_a_fine_tuned_model_and_of_earlier_versions_are_refused(parent, records, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    shutil.copytree(parent, tuned)
    (file,) = tuned.glob("*.safetensors")
    weights = bytearray(file.read_bytes())
    weights[len(weights) // 2] ^= 1  # all that differs: names, sizes and the beginnings and ends of files are the same
    assert len(weights) > 3 * 65_536
    file.write_bytes(weights)
    assert main(flags(tuned, tmp_path / "run", "--from-records", records)) == 1
    assert "4 were recorded with other weights than the parent's" in " ".join(capsys.readouterr().err.split())
    sessions = Sessions(tmp_path / "old", weights="0123456789abcdef")
    sessions.open("s")
    sessions.reward("s", 1.0)
    sessions.close()
    assert main(flags(parent, tmp_path / "run", "--from-records", sessions.directory)) == 1
    assert "1 were recorded by an earlier version" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("more", [(), ("--executor", "processes", "--held-out-env", "sums", "--held-out.tasks", 2)])
def test_agents_reach_the_gateway_and_the_run_ends_when_its_steps_are_done(parent, tmp_path, capsys, monkeypatch, more):
    monkeypatch.setenv("GLM5_API_KEY", "secret")
    http, replies = httpx.Client(headers={"x-api-key": "secret"}, timeout=120), []

    def use(url):
        body = {"model": "glm5", "max_tokens": 4, "messages": [{"role": "user", "content": "?"}]}
        for number in range(4):
            assert httpx.post(f"{url}/s/{number}/v1/messages", json=body, timeout=120).status_code == 401
            replies.append(http.post(f"{url}/s/{number}/v1/messages", json=body).status_code)
            http.post(f"{url}/rl/sessions/{number}/reward", json={"value": number % 2})

    def said(text, **_):
        threading.Thread(target=use, args=(text.split("/s/")[0].removeprefix("Agents: "),)).start()

    monkeypatch.setattr("builtins.print", lambda text, **k: said(text) if str(text).startswith("Agents") else None)
    assert main(flags(parent, tmp_path / "run", "--from-gateway", "--port", 0, "--steps", 1, *more)) == 0
    assert replies == [200] * 4
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["trained"] == 4 and line["trained_reward"] == 0.5
    assert ("retention/sums/heldout/2/reward" in line) == bool(more)


def test_held_out_rewards_are_told_at_the_end(parent, records, tmp_path, capsys):
    more = ["--from-records", records, "--held-out-env", "sums", "--held-out.tasks", "2"]
    assert main(flags(parent, tmp_path / "run", *more)) == 0
    ends = json.loads(capsys.readouterr().out)["held_out"]["sums/heldout/2/reward"]
    assert [version for version, _ in ends] == [0, 1]
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--threads", "1"]) == 0
    (first, last), heard = (f"{value:.3f} at version {version}" for version, value in ends), capsys.readouterr().out
    assert f"held out: sums/heldout/2/reward {first}, {last}" in heard


def test_a_run_from_records_goes_on_and_is_replayed_by_its_directory_alone(parent, records, tmp_path, capsys):
    assert main(flags(parent, tmp_path / "run", "--from-records", records, "--steps", 1)) == 0
    capsys.readouterr()
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--json", "--threads", "1"]) == 0
    heard = capsys.readouterr()
    assert json.loads(heard.out)["steps"] == 1 and "is finished" in heard.err
    assert main(["rl", "--replay-step", "0", "--out", str(tmp_path / "run"), "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True
    assert main(["rl", "--resume", "--out", str(tmp_path / "run"), "--uniform-groups", "keep"]) == 1
    assert "--uniform-groups: tasks of" in capsys.readouterr().err


def test_sessions_that_were_deleted_are_still_those_of_a_run_that_has_had_them(parent, tmp_path, capsys, monkeypatch):
    eight = recorded(parent, tmp_path / "records", [True] * 8)
    assert main(flags(parent, tmp_path / "whole", "--from-records", eight)) == 0
    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, batch: 1 / 0 if batch.step == 1 else step(self, batch))
    with pytest.raises(ZeroDivisionError):
        main(flags(parent, tmp_path / "torn", "--from-records", eight))
    monkeypatch.undo()
    for path in list((eight / "finished").iterdir())[:5]:
        path.unlink()
    resume = ["rl", "--resume", "--out", str(tmp_path / "torn"), "--json", "--threads", "1"]
    for _ in range(2):  # the second time it is finished, and says so
        assert main(resume) == 0
    assert "has made all of its 2 steps" in " ".join(capsys.readouterr().err.split())
    runs = [tmp_path / name / "metrics.jsonl" for name in ("whole", "torn")]
    assert runs[0].read_text() == runs[1].read_text() and runs[0].read_text().count("\n") == 2


def test_a_port_that_is_taken_leaves_no_run_behind(parent, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(flags(parent, tmp_path / "run", "--from-gateway", "--port", port)) == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--from-gateway", "--from-records", "x"], "give one of"),
        (["--from-records", "nowhere"], "no recorded sessions"),
        (["--from-records", "nowhere", "--executor", "processes"], "samples nothing"),
        (["--from-records", "nowhere", "--scheduler.mode", "sync"], "scheduler.mode is sync"),
        (["--from-gateway", "--scheduler.max-running", 7], "it is always 20 here"),
        (["--from-gateway", "--scheduler.max-attempts", 2], "scheduler.max_attempts is 2"),
        (["--from-gateway", "--rollout.thinking"], "rollout.thinking says how"),
        (["--from-records", "nowhere", "--rollout.max-tokens", 64], "rollout.max_tokens says how"),
        (["--from-gateway", "--patience", 60], "leave patience out"),
    ],
)
def test_what_is_refused(parent, tmp_path, capsys, more, says):
    assert main(flags(parent, tmp_path / "run", *more)) != 0
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
