"""The life of a session: opening, rewards, expiry, limits, keys, forgetting."""

import httpx
import pytest
from gateway_tools import OFF, USER, add_turn, ask, gateway, rollout

from glm5.errors import RunError
from glm5.rl.gateway import SessionLimits, Sessions
from glm5.serve import ApiError


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with gateway(tmp_path_factory.mktemp("sessions")) as found:
        yield found


def test_a_session_begins_with_its_first_request_and_a_reward_ends_it(running):
    assert running.post("/new/reward", value=1.0).status_code == 404
    ask(running.openai("new"), USER)
    known = httpx.get(f"{running.url}/rl/sessions/new", timeout=60).json()
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
        reply = httpx.post(f"{running.url}/rl/sessions/infinite/reward", timeout=60, content=f'{{"value": {value}}}',
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
    assert httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    assert running.sessions.counts() == before
    httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60, headers={"X-Session-ID": "by-header"})
    ids = {"token_ids": [40, 41], "sampling_params": {"max_tokens": 3, "ignore_eos": True}}
    httpx.post(f"{running.url}/s/by-header/inference/v1/generate", json=ids, timeout=60)
    assert [len(turn.output_ids) for turn in running.turns("by-header")] == [3, 3]
    wrong = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60, headers={"X-Session-ID": "a b"})
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
        assert httpx.delete(f"{running.url}/rl/sessions/{name}", timeout=60).json()["deleted"]
        assert running.reward(name, 1.0).status_code == 404
        assert not [path for path in running.sessions.directory.rglob("*") if name in path.name]


def test_silence_closes_a_session_with_the_reward_it_has(tmp_path):
    now = [1000.0]
    sessions = Sessions(tmp_path, limits=SessionLimits(idle_hours=1), clock=lambda: now[0])
    for name in ("silent", "rewarded", "busy", "asking"):
        sessions.open(name)
        add_turn(sessions, name)
    sessions.reward("rewarded", 0.5, final=False)
    now[0] += 3000
    add_turn(sessions, "busy")
    now[0] += 1000
    with sessions.request("asking"):  # an answer of more than an hour
        sessions.expire()
    assert sessions.counts() == {"open": 2, "closed": 2, "damaged": 0}
    sessions.expire()
    assert sessions.counts() == {"open": 1, "closed": 3, "damaged": 0}
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


def test_the_key_of_the_server_guards_every_call(tmp_path):
    with gateway(tmp_path, api_key="secret") as running:
        for method, path in [("POST", ""), ("GET", ""), ("GET", "/x"), ("POST", "/x/reward"), ("DELETE", "/x")]:
            assert httpx.request(method, f"{running.url}/rl/sessions{path}", json={}, timeout=60).status_code == 401
        for path in ("/s/x/v1/chat/completions", "/s/x/v1/messages", "/s/x/health/../v1/models", "/s/x/rl/sessions"):
            assert httpx.post(f"{running.url}{path}", json={}, timeout=60).status_code == 401
        assert running.sessions.counts() == {"open": 0, "closed": 0, "damaged": 0}
        client = running.openai("x").with_options(api_key="secret")
        ask(client, USER)
        assert running.sessions.counts()["open"] == 1
