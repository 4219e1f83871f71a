"""`glm5 rl --from-records` and `--from-gateway` from the command line."""

import json
import shutil
import threading

import httpx
import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli.main import main
from glm5.engine import Engine, SamplingParams
from glm5.rl.gateway import Sessions
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
    sessions = Sessions(tmp_path / "records", weights=directory_sha256(parent))
    (output,) = Engine(parent).generate([[40, 41]], SamplingParams(n=4, max_tokens=5, seed=0))
    for number, said in enumerate(output.outputs):
        session = sessions.open(f"s{number}")
        turn = Turn((40, 41), said.token_ids, said.logprobs, said.versions, said.finish_reason)
        sessions._write(session.id, session.turn_event(turn, learnt=True))
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
    http, replies = httpx.Client(headers={"x-api-key": "secret"}), []

    def use(url):
        body = {"model": "glm5", "max_tokens": 4, "messages": [{"role": "user", "content": "?"}]}
        for number in range(4):
            assert httpx.post(f"{url}/s/{number}/v1/messages", json=body).status_code == 401
            replies.append(http.post(f"{url}/s/{number}/v1/messages", json=body, timeout=60).status_code)
            http.post(f"{url}/rl/sessions/{number}/reward", json={"value": number % 2})

    def said(text, **_):
        threading.Thread(target=use, args=(text.split("/s/")[0].removeprefix("Agents: "),)).start()

    monkeypatch.setattr("builtins.print", lambda text, **k: said(text) if str(text).startswith("Agents") else None)
    assert main(flags(parent, tmp_path / "run", "--from-gateway", "--port", 0, "--steps", 1, *more)) == 0
    assert replies == [200] * 4
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["trained"] == 4 and line["trained_reward"] == 0.5
    assert ("retention/sums/heldout/2/reward" in line) == bool(more)


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


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--from-gateway", "--from-records", "x"], "give one of"),
        (["--from-records", "nowhere"], "no recorded sessions"),
        (["--from-records", "nowhere", "--executor", "processes"], "samples nothing"),
    ],
)
def test_what_is_refused(parent, tmp_path, capsys, more, says):
    assert main(flags(parent, tmp_path / "run", *more)) != 0
    assert says in capsys.readouterr().err
