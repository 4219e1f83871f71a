"""OpenEnv's protocol against a stand-in server that speaks it over a real socket."""

import asyncio
import importlib.util
import json
import socket as sockets

import pytest
from episodes import play, played, said
from live_server import live
from openenv_server import Server

from glm5.envs import EnvironmentFailure, EpisodeLimits, OpenEnv
from glm5.errors import InputError


def adding(message):
    content = message["content"]
    return {"add": int(content) if content.isdigit() else content}


@pytest.fixture(scope="module")
def server():
    server = Server()
    with live(server.app) as server.url:
        yield server


@pytest.fixture
def env(server):
    server.wait()
    server.frames.clear()
    return OpenEnv("adding", server.url, instructions="Add up.", action=adding)


def test_an_episode_is_one_session(env, server):
    task = env.task(0, 0)
    seen, _ = play(env, task, said("1"))
    missing = int(seen[0].messages[0]["content"].removeprefix("Add up.\n\n").split()[0])
    seen, reward = play(env, task, *[said("1")] * missing)
    assert seen[-1].done and reward.value == 1.0
    assert [o.messages[0]["content"] for o in seen[1:-1]] == [f"{n} are missing" for n in range(missing - 1, 0, -1)]
    server.wait()
    kinds = [frame["type"] for frame in server.frames]
    assert kinds == ["reset", "step", "close", "reset", *["step"] * missing, "close"]
    assert play(env, task, said(str(missing + 1)))[1].value == 0.0
    assert len({frame["data"]["seed"] for frame in server.frames if frame["type"] == "reset"}) == 1


def test_sessions_are_apart(env, server):
    async def all_at_once():
        return await asyncio.gather(*(played(env, env.task(1, i), [said("1")]) for i in range(4)))

    firsts = [seen[0] for seen, _ in asyncio.run(all_at_once())]
    assert firsts == [play(env, env.task(1, i))[0][0] for i in range(4)] and len(set(map(str, firsts))) > 1


def test_a_refused_action_is_told_and_the_episode_goes_on(env):
    seen, _ = play(env, env.task(0, 0), said("many"), said("1"))
    assert seen[1].messages[0]["content"] == "That is no valid action: Input should be a valid integer"
    assert "are missing" in seen[2].messages[0]["content"] or seen[2].done


@pytest.mark.parametrize(("words", "kind", "message"), [("13", "crash", "thirteen"), ("14", "unreachable", "broke")])
def test_what_the_server_breaks_is_a_failure(env, words, kind, message):
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        play(env, env.task(0, 0), said(words))
    assert caught.value.kind == kind


def test_a_full_server_is_a_failure(env, server):
    server.most = 0
    try:
        with pytest.raises(EnvironmentFailure, match="no place is free"):
            play(env, env.task(0, 0))
    finally:
        server.most = 40


def test_no_server_and_no_websocket_are_unreachable():
    with sockets.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for url in (address, address.replace("http", "ws")):
            env = OpenEnv("nobody", url, limits=EpisodeLimits())
            with pytest.raises(EnvironmentFailure, match="/ws cannot be reached") as caught:
                play(env, env.task(0, 0))
            assert caught.value.kind == "unreachable"


def test_observations_are_shown_as_their_text_or_as_json(server):
    env = OpenEnv("plain", server.url)
    assert env.shown({"text": "hi", "metadata": {"a": 1}, "left": 3}) == "hi"
    assert json.loads(env.shown({"a": "x", "b": "y", "metadata": {}})) == {"a": "x", "b": "y"}


def test_other_addresses_and_a_missing_package_are_refused(monkeypatch, server):
    with pytest.raises(InputError, match="no address of an OpenEnv server"):
        OpenEnv("x", "ftp://example.org")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"glm5\[envs\]"):
        OpenEnv("x", server.url)
