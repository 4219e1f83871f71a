"""What is recorded of answers: of clients that leave, under way at the reward, not learnt from, in branches."""

import asyncio
import json
import shutil
import time

import pytest
from asgi_client import Call, scope_of
from gateway_tools import OFF, USER, ask, gateway, rollout
from speaker import ScriptedModel, speaker_tokenizer

from glm5.engine import Engine
from glm5.rl.gateway import Sessions, create_gateway
from glm5.serve import ApiError


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_whose_client_left_is_recorded_and_not_learnt(tmp_path, stream):
    model = ScriptedModel("one two three four five six seven")
    model.delay = 0.1
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


def test_the_time_of_a_turn_is_no_longer_than_its_client_waited(tmp_path):
    with gateway(tmp_path) as running:
        for place in range(3):
            began = time.perf_counter()
            ask(running.openai("timed"), USER, n=2, max_tokens=2 + place)
            waited = time.perf_counter() - began
            assert all(0 < turn.seconds <= waited for turn in running.turns("timed")[2 * place :])


@pytest.mark.parametrize("stream", [True, False])
def test_answers_under_way_when_the_final_reward_comes_are_part_of_the_session(tmp_path, stream):
    model = ScriptedModel("one two three four five six seven")
    model.delay = 0.2  # so that both are under way until all has been asked
    engine, sessions = Engine(model, speaker_tokenizer()), Sessions(tmp_path / "live")
    app = create_gateway(engine, sessions, model_name="tiny")
    body = json.dumps({"model": "tiny", "messages": USER, "stream": stream, **OFF}).encode()

    async def story():
        tasks = [asyncio.create_task(Call(app, scope_of("/s/early/v1/chat/completions"), body).run()) for _ in "ab"]
        while engine.stats().sampled_tokens < 3:
            await asyncio.sleep(0.01)
        call = await Call(app, scope_of("/rl/sessions/early/reward"), b'{"value": 1.0}').run()
        assert (call.json["state"], call.json["under_way"]) == ("finished", 2)
        assert call.json["note"].endswith(
            "2 requests are under way; what is answered is part of the session, and counts too."
        )
        with pytest.raises(ApiError, match="is closed; begin another one"):
            sessions.begin("early")
        with pytest.raises(ApiError, match="cannot be given up"):
            sessions.abandon("early", "")
        assert not list(sessions.finished.iterdir())
        shutil.copytree(tmp_path / "live", tmp_path / "killed")
        model.delay = 0.0
        await asyncio.wait(tasks)

    asyncio.run(story())
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
