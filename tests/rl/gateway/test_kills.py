"""`glm5 rl --from-gateway` is killed again and again while agents talk to it; they retry, and nothing is lost."""

import asyncio
import threading
from collections import Counter

import httpx
import killed_gateway
import pytest
import torch
from killed_gateway import GROUP, STEPS, Agents
from live_server import kept_port, live
from scripted import brief_model
from speaker import speaker_tokenizer

import glm5
from glm5.engine import Engine
from glm5.optim import OptimizerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.fleet import InProcessFleet
from glm5.rl.gateway import Address, FinishedSessions, Sessions
from glm5.rl.gateway.learning import OpenFleet
from glm5.rl.gateway.session import read_session
from glm5.rl.journal import read_journal
from glm5.rl.learner import Learner
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.meter import Meter
from glm5.rl.replay import batches_of

USER = {"role": "user", "content": "?"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.soak)])
def test_killed_gateways_lose_no_session_and_learn_from_none_twice(parent, tmp_path, kills):
    died, number = 0, 0
    while died < kills:
        path = tmp_path / f"killed-{number}"
        with kept_port() as port:
            agents = Agents(port)
            thread = threading.Thread(target=agents.run)
            thread.start()
            try:
                died += killed_gateway.killed(parent, path, port, min(kills - died, 4), seed=number)
            finally:
                agents.stopped.set()
                thread.join()
        check(parent, path, agents)
        number += 1


def check(parent, path, agents):
    assert agents.refused == [] and agents.retries > 0
    closed = {s.id: s for s in map(read_session, sorted((path / "sessions" / "finished").glob("*.jsonl")))}
    still_open = {s.id: s for s in map(read_session, (path / "sessions" / "open").glob("*.jsonl"))}
    # What an agent was told is on the disk: its answers, and its rewards, each in one session that went on.
    assert {name: closed[name].reward.value for name in agents.rewarded} == agents.rewarded
    assert not closed.keys() & still_open.keys()
    for name, answers in agents.heard.items():
        recorded = [turn.answer["content"] or "" for turn in {**closed, **still_open}[name].turns]
        assert not Counter(text or "" for text in answers) - Counter(recorded)
    # Groups are taken in the order of their closing, whole, and once.
    events = [event for record in read_journal(path / "journal") for event in events_of(record)]
    taken = Counter(event.rollout.task.id for event in events if event.kind == "finished" and event.rollout.turns)
    assert set(taken.values()) == {1}
    groups = [[r.task.id for r in ready.rollouts] for ready in FinishedSessions(path / "sessions", GROUP).poll()]
    known = [[name in taken for name in group] for group in groups]
    assert all(len(set(group)) == 1 for group in known[:-1])
    order = [all(group) for group in known]
    assert order == sorted(order, reverse=True) and sum(order) >= STEPS
    # Every one of them has one fate, and what was learnt from is what was recorded.
    batches = list(batches_of(path / "journal"))
    assert [batch.step for batch in batches] == list(range(STEPS))
    trained = [rollout for batch in batches for rollout in batch.rollouts]
    assert max(Counter(rollout.task.id for rollout in trained).values()) == 1
    for rollout in trained:
        session = closed[rollout.task.id]
        assert rollout.reward.value == session.reward.value
        assert rollout.turns == tuple(r.turn for r in session.turns if r.learnt)
        sampled = sum(len(turn.output_ids) for turn in rollout.turns)
        assert rollout.num_sampled == sampled == sum(sum(t.sampled) for t in rollout.trajectories)
    # The batches alone give the weights.
    optimizer = RLRunConfig(parent=parent).learner.optimizer
    config = LearnerConfig(optimizer=OptimizerConfig(**{**vars(optimizer), "lr": 1e-3}))
    learner = Learner(glm5.load_model(parent, dtype=torch.float32), config)
    for batch in batches:
        learner.step(batch)
    weights = glm5.load_model(path / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in learner.model.state_dict().items())


def test_a_request_that_is_repeated_after_a_kill_is_answered_as_without_it(tmp_path):
    """Not with the answer that the session holds already, whose tokens would be trained twice."""
    said = []
    for kills in (0, 1):
        answers, directory = [], tmp_path / f"{kills}"
        for asked in (3,) if kills == 0 else (2, 1):
            fleet = InProcessFleet([Engine(brief_model(), speaker_tokenizer(), strict=True)])
            sessions = Sessions(directory, own_sampling=True)
            opened = OpenFleet(fleet, sessions, Address(), 5, Meter(), None)
            with live(opened.app) as url:
                body = {
                    "model": "glm5",
                    "messages": [{"role": "user", "content": "?"}],
                    "max_tokens": 9,
                    "ignore_eos": True,
                }
                for _ in range(asked):
                    assert httpx.post(f"{url}/s/one/v1/chat/completions", json=body, timeout=60).status_code == 200
                asyncio.run(fleet.close())
                opened._door.closed = True
                refused = httpx.post(f"{url}/s/one/v1/chat/completions", json=body, timeout=60)
                assert refused.status_code == 503 and "ask again" in refused.text
            answers = [recorded.turn.output_ids for recorded in sessions.find("one").turns]
            sessions.close()
        said.append(answers)
    assert said[0] == said[1] and len(set(said[0])) == 3
