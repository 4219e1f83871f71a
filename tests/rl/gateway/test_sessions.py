"""The life of a session: opening, rewards, expiry, restarts, clients that leave, limits, keys, forgetting."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys

import httpx
import pytest
from asgi_client import Call, scope_of
from gateway_tools import OFF, ask, gateway
from scripted import ScriptedSource
from speaker import ScriptedModel, speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.errors import RunError
from glm5.rl.gateway import FinishedSessions, OwnDistribution, SessionLimits, Sessions, create_gateway
from glm5.rl.gateway.session import own_distribution
from glm5.rl.records import Ticket, Turn
from glm5.serve import ApiError

USER = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with gateway(tmp_path_factory.mktemp("sessions")) as found:
        yield found


def add_turn(sessions, name, output=(5, 6), prompt=(1, 2)):
    """A turn without a server."""
    session = sessions._open[name].session
    turn = Turn(prompt, output, (-0.5,) * len(output), (3,) * len(output), "stop")
    sessions._write(name, session.turn_event(turn, learnt=True))


def rollout(sessions, name):
    return sessions.find(name).rollout(Ticket("gateway", 0))


def test_a_session_begins_with_its_first_request_and_a_reward_ends_it(running):
    assert running.post("/new/reward", value=1.0).status_code == 404
    ask(running.openai("new"), USER)
    known = httpx.get(f"{running.url}/rl/sessions/new").json()
    assert (known["state"], known["turns"], known["reward"]) == ("open", 1, None)
    assert running.reward("new", 0.25, reason="so so").json()["reward"] == {"value": 0.25, "reason": "so so"}
    with pytest.raises(Exception, match="The session 'new' is closed; begin another one"):
        ask(running.openai("new"), USER)
    found = rollout(running.sessions, "new")
    assert (found.outcome, found.reward.value, found.reward.reason) == ("truncated", 0.25, "so so")
    assert found.task.messages == ({"role": "user", "content": "What is 12 + 30?"},)


def test_a_reward_that_came_twice_is_heard_once_and_another_one_is_refused(running):
    running.post("", session="twice")
    assert running.reward("twice", 1.0).status_code == 200
    assert running.reward("twice", 1.0).status_code == 200
    refused = running.reward("twice", 0.0)
    assert refused.status_code == 409 and "has its final reward already: 1.0" in refused.json()["error"]["message"]
    running.post("", session="later")
    assert running.reward("later", 1.0, final=False).json()["state"] == "open"
    assert running.reward("later", 0.5, final=False).json()["reward"]["value"] == 0.5
    assert running.reward("later", 0.75).json()["state"] == "finished"
    assert running.sessions.find("later").reward.value == 0.75


@pytest.mark.parametrize(("method", "path", "body", "status", "word"), [
    ("POST", "/nobody/reward", {"value": 1}, 404, "There is no session 'nobody' here"),
    ("POST", "/nobody/abandon", {}, 404, "There is no session 'nobody' here"),
    ("GET", "/nobody", None, 404, "There is no session 'nobody' here"),
    ("DELETE", "/nobody", None, 404, "There is no session 'nobody' here"),
    ("POST", "/x/reward", {"valeu": 1}, 400, "Did you mean 'value'"),
    ("POST", "/x/reward", {"value": "good"}, 400, "value"),
    ("POST", "", {"session": "a/b"}, 400, "letters, digits"),
    ("POST", "", {"session": "../x"}, 400, "letters, digits"),
])  # fmt: skip
def test_what_is_refused_and_how(running, method, path, body, status, word):
    reply = httpx.request(method, f"{running.url}/rl/sessions{path}", json=body)
    assert reply.status_code == status and word in reply.json()["error"]["message"]


def test_a_reward_is_a_number_that_can_be_compared(running):
    running.post("", session="infinite")
    for value in ("Infinity", "NaN", "1.7e308", "-1000001"):
        reply = httpx.post(f"{running.url}/rl/sessions/infinite/reward", content=f'{{"value": {value}}}',
                           headers={"Content-Type": "application/json"})  # fmt: skip
        assert reply.status_code == 400, reply.text


def test_opening_is_idempotent_and_names_group_and_task(running):
    made = running.post("", group="g", task="count").json()
    assert made["session"].startswith("s-") and made["openai_base_url"] == f"/s/{made['session']}/v1"
    again = {"session": made["session"], "group": "g", "task": "count"}
    assert running.post("", **again).json() == made
    assert running.post("", **{**again, "group": "h"}).status_code == 409


def test_the_header_names_the_session_too_and_requests_without_one_are_not_recorded(running):
    body = {"model": "tiny", "messages": USER, "max_tokens": 3, "ignore_eos": True, **OFF}
    before = running.sessions.counts()
    assert httpx.post(f"{running.url}/v1/chat/completions", json=body).status_code == 200
    assert running.sessions.counts() == before
    httpx.post(f"{running.url}/v1/chat/completions", json=body, headers={"X-Session-ID": "by-header"})
    ids = {"token_ids": [40, 41], "sampling_params": {"max_tokens": 3, "ignore_eos": True}}
    httpx.post(f"{running.url}/s/by-header/inference/v1/generate", json=ids)
    assert [len(turn.output_ids) for turn in running.turns("by-header")] == [3, 3]
    wrong = httpx.post(f"{running.url}/v1/chat/completions", json=body, headers={"X-Session-ID": "a b"})
    assert wrong.status_code == 400 and "letters, digits" in wrong.json()["error"]["message"]


def test_a_given_up_session_is_aborted_and_never_a_reward_of_zero(running):
    ask(running.openai("left"), USER)
    assert running.post("/left/abandon", reason="the agent crashed").json()["state"] == "aborted"
    found = rollout(running.sessions, "left")
    assert (found.outcome, found.reward, found.failure) == ("aborted", None, "the agent crashed")
    late = running.reward("left", 1.0)
    assert late.status_code == 409 and "was given up: the agent crashed" in late.json()["error"]["message"]
    assert running.post("/twice/abandon").status_code in (404, 409)


def test_forgetting_deletes_everything(running):
    for name, close in (("forget-open", False), ("forget-closed", True)):
        ask(running.openai(name), USER)
        if close:
            running.reward(name, 1.0)
        assert httpx.delete(f"{running.url}/rl/sessions/{name}").json()["deleted"]
        assert running.reward(name, 1.0).status_code == 404
        assert not [path for path in running.sessions.directory.rglob("*") if name in path.name]


def test_silence_closes_a_session_with_the_reward_it_has(tmp_path):
    now = [1000.0]
    sessions = Sessions(tmp_path, limits=SessionLimits(idle_hours=1), clock=lambda: now[0])
    for name in ("silent", "rewarded", "busy"):
        sessions.open(name)
        add_turn(sessions, name)
    sessions.reward("rewarded", 0.5, final=False)
    now[0] += 3000
    add_turn(sessions, "busy")
    now[0] += 1000
    sessions.expire()
    assert sessions.counts() == {"open": 1, "closed": 2, "damaged": 0}
    assert rollout(sessions, "silent").outcome == "aborted" and "1 hours" in rollout(sessions, "silent").failure
    assert (rollout(sessions, "rewarded").outcome, rollout(sessions, "rewarded").reward.value) == ("ok", 0.5)
    sessions.close()


def test_limits(tmp_path):
    sessions = Sessions(tmp_path, limits=SessionLimits(max_open=2, max_tokens=7))
    sessions.open("a")
    sessions.open("b")
    with pytest.raises(ApiError, match="2 sessions are open"):
        sessions.begin("c")
    sessions.abandon("b", "")
    sessions.begin("c")
    add_turn(sessions, "a")
    sessions.begin("a")
    add_turn(sessions, "a", prompt=(1, 2, 5, 6, 7))  # what was there before does not count again
    with pytest.raises(ApiError, match="holds 7 tokens"):
        sessions.begin("a")
    sessions.close()


def test_a_place_that_holds_no_sessions_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file cannot hold sessions .*; choose another directory"):
        Sessions(tmp_path / "file")


# ---- restarts ----------------------------------------------------------------------------------------------------
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


SERVER = """
import sys
from pathlib import Path
from speaker import ScriptedModel, speaker_tokenizer
from glm5.engine import Engine
from glm5.rl.gateway import Sessions, create_gateway
from glm5.serve import serve
model = ScriptedModel("the fox " * 4)
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
        with httpx.stream("POST", f"{url}/s/killed/v1/chat/completions", json={**body, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)  # killed in the middle of an answer
            process.send_signal(signal.SIGKILL)
        process.wait()
    sessions = Sessions(tmp_path)
    assert [recorded.turn.output_ids for recorded in sessions.find("killed").turns] == answers
    sessions.close()


# ---- clients that leave, keys ------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_whose_client_left_is_recorded_and_not_learnt(tmp_path, stream):
    model = ScriptedModel("one two three four five six seven")
    model.delay = 0.02
    engine, sessions = Engine(model, speaker_tokenizer()), Sessions(tmp_path)
    app = create_gateway(engine, sessions, model_name="tiny")
    body = json.dumps({"model": "tiny", "messages": USER, "stream": stream, **OFF}).encode()

    async def leave():
        call = Call(app, scope_of("/s/gone/v1/chat/completions"), body)
        task = asyncio.create_task(call.run())
        while (len(call.sent) < 4 and stream) or engine.stats().sampled_tokens < 3:
            await asyncio.sleep(0.01)
        call.leave()
        await asyncio.wait([task])

    asyncio.run(leave())
    (recorded,) = sessions.find("gone").turns
    assert recorded.turn.finish_reason == "abort" and not recorded.learnt
    assert 0 < len(recorded.turn.output_ids) < len(model.script)
    sessions.reward("gone", 1.0)
    assert rollout(sessions, "gone").trajectories == ()
    sessions.close()
    engine.close()


@pytest.mark.parametrize("stream", [True, False])
def test_answers_under_way_when_the_final_reward_comes_are_part_of_the_session(tmp_path, stream):
    model = ScriptedModel("one two three four five six seven")
    model.delay = 0.02
    engine, sessions = Engine(model, speaker_tokenizer()), Sessions(tmp_path / "live")
    app = create_gateway(engine, sessions, model_name="tiny")
    body = json.dumps({"model": "tiny", "messages": USER, "stream": stream, **OFF}).encode()

    async def rewarded():
        tasks = [asyncio.create_task(Call(app, scope_of("/s/early/v1/chat/completions"), body).run()) for _ in "ab"]
        while engine.stats().sampled_tokens < 3:
            await asyncio.sleep(0.01)
        assert sessions.reward("early", 1.0).state == "finished"
        with pytest.raises(ApiError, match="is closed; begin another one"):
            sessions.begin("early")
        with pytest.raises(ApiError, match="cannot be given up"):
            sessions.abandon("early", "")
        assert not list(sessions.finished.iterdir())
        shutil.copytree(tmp_path / "live", tmp_path / "killed")
        await asyncio.wait(tasks)

    asyncio.run(rewarded())
    assert [path.name for path in sessions.finished.iterdir()] == ["00000000-early.jsonl"]
    assert [turn.output_ids for turn in rollout(sessions, "early").turns] == [tuple(model.script)] * 2
    sessions.close()
    engine.close()
    again = Sessions(tmp_path / "killed")  # what was under way was lost with the server
    assert again.counts()["closed"] == 1 and again.reward("early", 1.0).turns == []
    again.close()


def test_a_session_says_how_much_of_it_can_be_learnt_from(tmp_path, caplog):
    with gateway(tmp_path) as running:
        empty = running.post("", session="empty").json()
        assert empty["learnable_tokens"] == 0 and empty["note"].startswith("No answer is recorded here")
        for _ in range(2):
            ask(running.openai("cold"), USER, temperature=0.7, max_tokens=3)
        known = running.reward("cold", 1.0).json()
        assert known["sampled_tokens"] == 6 and known["learnable_tokens"] == 0
        assert known["note"].startswith("0 of 6 tokens can be learnt from, so its reward counts for nothing")
        ask(running.openai("mixed"), USER, temperature=0.7, max_tokens=3)
        ask(running.openai("mixed"), USER, max_tokens=2)
        assert running.reward("mixed", 1.0).json()["note"] == "2 of 5 tokens can be learnt from."
    warned = [record.message for record in caplog.records if "is said once" in record.message]
    assert len(warned) == 1 and "An answer of session cold" in warned[0]


def test_every_branch_of_a_session_is_told_with_the_turns_that_said_it(tmp_path):
    with gateway(tmp_path) as running:
        client = running.openai("s")
        first = {"role": "assistant", "content": ask(client, USER, max_tokens=3).choices[0].message.content}
        ask(client, [*USER, first, *USER], max_tokens=3)
        other = [{"role": "user", "content": "And 2 + 2?"}, {"role": "assistant", "content": "5"}, *USER]
        ask(client, other, max_tokens=3, temperature=0.5)
        ask(client, other, max_tokens=3)
        running.reward("s", 1.0)
        found = rollout(running.sessions, "s")
    assert len(found.turns) == 3 and [branch.turns for branch in found.branches] == [
        (None, 0, None, 1), (None, None, None, None), (None, None, None, 2)
    ]  # fmt: skip
    said = [[message["content"] for message in branch.messages] for branch in found.branches]
    assert said[0][:3] == [USER[0]["content"], first["content"], USER[0]["content"]]
    assert said[2][:3] == ["And 2 + 2?", "5", USER[0]["content"]]


def test_the_reward_of_a_session_without_an_answer_is_nobodys(tmp_path):
    sessions = Sessions(tmp_path)
    sessions.open("empty")
    sessions.reward("empty", 1.0)
    found = rollout(sessions, "empty")
    assert (found.outcome, found.reward, found.failure) == ("aborted", None, "no answer was recorded in it")
    sessions.close()


def test_the_key_of_the_server_guards_every_call(tmp_path):
    with gateway(tmp_path, api_key="secret") as running:
        for method, path in [("POST", ""), ("GET", ""), ("GET", "/x"), ("POST", "/x/reward"), ("DELETE", "/x")]:
            assert httpx.request(method, f"{running.url}/rl/sessions{path}", json={}).status_code == 401
        for path in ("/s/x/v1/chat/completions", "/s/x/v1/messages", "/s/x/health/../v1/models", "/s/x/rl/sessions"):
            assert httpx.post(f"{running.url}{path}", json={}).status_code == 401
        assert running.sessions.counts() == {"open": 0, "closed": 0, "damaged": 0}
        client = running.openai("x").with_options(api_key="secret")
        ask(client, USER)
        assert running.sessions.counts()["open"] == 1


# ---- sampling and reading ----------------------------------------------------------------------------------------
def test_a_learning_gateway_samples_from_the_model_itself_whatever_is_asked(tmp_path):
    seen = []
    engine = Engine(speaker_model(), speaker_tokenizer())
    for run in range(2):
        source = OwnDistribution(engine, seed=5)
        with gateway(tmp_path / str(run), source=source, own_sampling=True) as running:
            for name in ("a", "b"):
                for _ in range(2):
                    ask(running.openai(name), USER, temperature=0, seed=3)
            assert all(recorded.learnt for name in "ab" for recorded in running.sessions.find(name).turns)
            seen.append([turn.output_ids for name in "ab" for turn in running.turns(name)])
    assert seen[0] == seen[1] and len(set(seen[0])) == 4
    params = SamplingParams(temperature=0.3, logit_bias={4: 2.0}, bad_sequences=[[5]], max_tokens=5, stop="x")
    stream = OwnDistribution(engine).stream([40, 41], params, session_id="s", priority=0, deadline=None)
    stream.close()
    engine.close()
    source = ScriptedSource("one two")
    OwnDistribution(source).stream([40, 41], params, session_id="s", priority=0, deadline=None)
    assert not own_distribution(params) and own_distribution(source.params[0])
    assert source.params[0].bad_sequences == () and source.params[0].stop == ("x",)


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
    assert [[r.task.id for r in ready.rollouts] for ready in groups] == [["c", "a"], ["d", "e"], ["f", "g"]]
    groups = [ready.rollouts for ready in groups]
    assert [group[0].task.category for group in groups] == ["g", "gateway", "g"]
    assert [group[0].ticket for group in groups] == [
        Ticket("gateway", 1), Ticket("gateway", 2), Ticket("gateway", 1, 1)
    ]  # fmt: skip
    assert [r.outcome for r in groups[1]] == ["aborted", "ok"] and finished.waiting == 1
    assert [ready.rollouts for ready in FinishedSessions(tmp_path, 2, weights="w1").poll()] == groups
    other = FinishedSessions(tmp_path, 2, weights="w2")
    assert list(other.poll()) == [] and len(other.others) == 7
    sessions.close()
