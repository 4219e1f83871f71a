"""Sessions outlive their server: restarts, kills, torn and damaged files, and one process at a time."""

import os
import signal
import subprocess
import sys

import httpx
import pytest
from gateway_tools import OFF, USER, add_turn, ask, gateway, rollout

from glm5.errors import RunError
from glm5.rl.gateway import Sessions
from glm5.rl.records import Turn


def test_a_restarted_gateway_goes_on_with_its_sessions(tmp_path):
    with gateway(tmp_path) as first:
        answer = ask(first.openai("s"), USER).choices[0].message
        first.reward("s", 0.5, final=False)
        ask(first.openai("done"), USER)
        first.reward("done", 1.0)
        before = first.turns("s")
        with pytest.raises(RunError, match="Another process records"):
            Sessions(tmp_path)
    with gateway(tmp_path) as second:
        assert second.turns("s") == before
        ask(second.openai("s"), [*USER, answer.model_dump(exclude_none=True), *USER])
        assert second.turns("s")[1].prompt_ids[: len(before[0].prompt_ids) + 12] == (
            before[0].prompt_ids + before[0].output_ids
        )
        assert second.reward("s", 1.0).json()["turns"] == 2
        assert second.reward("done", 1.0).status_code == 200
        assert len(list((tmp_path / "finished").iterdir())) == 2


def test_torn_lines_and_deaths_at_every_step_lose_nothing_that_was_answered(tmp_path):
    sessions = Sessions(tmp_path / "whole")
    sessions.open("s", group="g")
    add_turn(sessions, "s")
    add_turn(sessions, "s", prompt=(1, 2, 5, 6, 7), output=(8,))
    sessions.reward("s", 1.0)
    sessions.close()
    record = next((tmp_path / "whole" / "finished").iterdir()).read_bytes()
    lines = record.splitlines(keepends=True)
    for size in range(0, len(record) + 1, 7):
        directory = tmp_path / f"cut-{size}"
        (directory / "open").mkdir(parents=True)
        (directory / "open" / "s.jsonl").write_bytes(record[:size])
        again = Sessions(directory)
        whole = record[:size].count(b"\n")
        over = whole >= len(lines) - 1  # the last but one is the final reward
        assert again.counts() == {"open": int(whole > 0 and not over), "closed": int(over), "damaged": 0}
        if whole:
            assert len(again.find("s").turns) == max(0, min(whole - 1, 2)) and again.find("s").group == "g"
        again.close()


def dropping_thoughts(sessions, name, count):
    """A conversation whose client leaves every thought (51) out; gives the prompts."""
    session, said, messages, prompts = sessions.open(name), tuple(range(100)), [], []
    for number in range(count):
        messages += [{"role": "user", "content": f"question {number}"}]
        answer, end = {"role": "assistant", "content": f"answer {number}"}, (60, 1000 + number)
        prompts.append((*said, 50))
        turn = Turn(prompts[-1], (51, 52, *end), (-0.5,) * 4, (3,) * 4, "stop")
        event = session.turn_event(turn, learnt=True, messages=messages, answer=answer, splice=True)
        sessions._write(name, event)
        said, messages = (*said, 52, *end, 70, 71), [*messages, answer]
    return prompts


def test_a_record_grows_with_its_conversation_where_no_prompt_holds_a_whole_turn(tmp_path):
    sessions, size = Sessions(tmp_path), {}
    for name, count in [("short", 40), ("long", 80)]:
        prompts = dropping_thoughts(sessions, name, count)
        size[name] = (tmp_path / "open" / f"{name}.jsonl").stat().st_size
        sessions.reward(name, 1.0)
        closed = sessions.find(name)
        assert [recorded.turn.prompt_ids for recorded in closed.turns] == prompts
        assert closed.turns[-1].messages[::2] == tuple(
            {"role": "user", "content": f"question {number}"} for number in range(count)
        )
        assert closed.tokens == 101 + 4 * count + 6 * (count - 1)
        assert len(rollout(sessions, name).trajectories) == count
    assert size["long"] < 2.1 * size["short"]
    sessions.close()


def test_records_of_earlier_versions_are_read(tmp_path):
    """There a turn went on from all of an earlier one, or from none."""
    sessions = Sessions(tmp_path)
    session = sessions.open("old")
    for prompt in ((1, 2), (1, 2, 5, 6, 7)):
        turn = Turn(prompt, (5, 6), (-0.5, -0.5), (3, 3), "stop")
        event = session.turn_event(turn, learnt=True)
        del event["shared"]
        sessions._write("old", event)
    assert [recorded.turn.prompt_ids for recorded in sessions.find("old").turns] == [(1, 2), (1, 2, 5, 6, 7)]
    sessions.close()


def test_one_damaged_file_is_put_aside_and_the_others_go_on(tmp_path, caplog):
    sessions = Sessions(tmp_path)
    for name in ("good", "bad"):
        sessions.open(name)
        add_turn(sessions, name)
    sessions.close()
    path = tmp_path / "open" / "bad.jsonl"
    path.write_bytes(b"x" + path.read_bytes())
    again = Sessions(tmp_path)
    assert again.counts() == {"open": 1, "closed": 0, "damaged": 1} and len(again.find("good").turns) == 1
    assert (tmp_path / "damaged" / "bad.jsonl").exists() and "bad.jsonl is damaged at line 1" in caplog.text
    again.close()


def test_an_earlier_damaged_session_of_the_same_name_is_kept(tmp_path):
    sizes = set()
    for length in (1, 2, 3):
        sessions = Sessions(tmp_path)
        sessions.open("bad")
        add_turn(sessions, "bad", output=(5,) * length)
        sessions.close()
        path = tmp_path / "open" / "bad.jsonl"
        path.write_bytes(b"x" + path.read_bytes())
        sizes.add(path.stat().st_size)
    again = Sessions(tmp_path)
    assert again.counts() == {"open": 0, "closed": 0, "damaged": 3}
    assert {path.stat().st_size for path in (tmp_path / "damaged").iterdir()} == sizes and len(sizes) == 3
    again.close()


SERVER = """
import sys
from pathlib import Path
from speaker import ScriptedModel, speaker_tokenizer
from glm5.engine import Engine
from glm5.rl.gateway import Sessions, create_gateway
from glm5.serve import serve
model = ScriptedModel("the fox " * 40)  # long enough to be killed in the middle
model.delay = 0.02
sessions = Sessions(Path(sys.argv[1]))
app = create_gateway(Engine(model, speaker_tokenizer()), sessions, model_name="tiny")
serve(app, ready=lambda url: print(url, flush=True))
"""


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.soak)])
def test_a_killed_server_keeps_every_answer_that_a_client_has(tmp_path, kills):
    answers = []
    for _ in range(kills):
        command = [sys.executable, "-c", SERVER, str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        url = process.stdout.readline().strip()
        body = {"model": "tiny", "messages": USER, "max_tokens": 6, "return_token_ids": True, **OFF}
        for _ in range(2):
            reply = httpx.post(f"{url}/s/killed/v1/chat/completions", json=body, timeout=60).json()
            answers.append(tuple(reply["choices"][0]["token_ids"]))
        long = {**body, "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/s/killed/v1/chat/completions", json=long, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)  # killed in the middle of an answer
            process.send_signal(signal.SIGKILL)
        process.wait()
    sessions = Sessions(tmp_path)
    assert [recorded.turn.output_ids for recorded in sessions.find("killed").turns] == answers
    sessions.close()
