"""An asynchronous run that is killed loses nothing: what was finished is not sampled again, what was learnt is learnt
again to the bit."""

import time
from collections import Counter

import lockstep_runs
import pytest
import torch
from scripted import brief_model
from speaker import speaker_tokenizer

import glm5
from glm5.rl.event_log import events_of, pieces_of
from glm5.rl.journal import read_journal
from glm5.rl.learner import Learner
from glm5.rl.replay import batches_of


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.soak)])
def test_killed_asynchronous_runs_lose_nothing(parent, tmp_path, kills):
    started = time.perf_counter()
    lockstep_runs.run_freely(parent, tmp_path / "timed", resume=False)
    seconds, died, number = time.perf_counter() - started, 0, 0
    while died < kills:
        path = tmp_path / f"killed-{number}"
        died += lockstep_runs.killed(lockstep_runs.run_freely, parent, path, min(kills - died, 5), seconds, seed=number)
        check(parent, path)
        number += 1


def check(parent, path):
    records = list(read_journal(path / "journal"))
    events = [event for record in records for event in events_of(record)]
    finished = Counter(event.rollout.id for event in events if event.kind == "finished")
    assert set(finished.values()) == {1}
    fates = Counter(event.ticket.id for event in events if event.kind in ("dropped", "requeued"))
    batches = list(batches_of(path / "journal"))
    fates.update(rollout.id for batch in batches for rollout in batch.rollouts)
    assert set(fates.values()) == {1}
    assert [batch.step for batch in batches] == list(range(5))
    # Every interrupted turn went on: no token that was trained on is one that the journal did not hold before.
    sampled = Counter()
    for record in records:
        for piece in pieces_of(record):
            sampled[piece.ticket.id] += len(piece.turn.output_ids)
    for batch in batches:
        for rollout in batch.rollouts:
            assert sampled[rollout.id] >= sum(len(turn.output_ids) for turn in rollout.turns)
            assert rollout.staleness(batch.version) <= 3
    # The batches alone give the weights of the run, wherever it was killed.
    config = lockstep_runs.config_of(parent)
    learner = Learner(glm5.load_model(parent, dtype=torch.float32), config.learner)
    values = [learner.step(batch) for batch in batches]
    weights = glm5.load_model(path / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in learner.model.state_dict().items())
    lines = glm5.train.RunDirectory.open(path).read("metrics")
    assert [line["grad_norm"] for line in lines] == [value["grad_norm"] for value in values]
