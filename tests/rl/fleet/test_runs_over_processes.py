"""Whole runs over engines in processes, one of which is killed on the way."""

import os
import signal

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import SingleTurn
from glm5.envs.sums import Sums
from glm5.optim import OptimizerConfig
from glm5.rl.adapters import LoRA
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.executors import engine_processes
from glm5.rl.learner import Learner
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.orchestrator import train_rl
from glm5.rl.runner import RolloutConfig


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def config_of(parent, steps, **learner):
    return RLRunConfig(
        parent=parent, steps=steps, patience=300.0, rollout=RolloutConfig(max_tokens=24, report_every=4),
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=4, max_running=12, max_staleness=2),
        learner=LearnerConfig(optimizer=OptimizerConfig(name="adamw", lr=1e-3), rows=8, **learner),
    )  # fmt: skip


def test_a_run_loses_an_engine_and_nothing_else(parent, tmp_path, monkeypatch):
    config, fleets, step = config_of(parent, steps=4), [], Learner.step
    make = engine_processes(config, 2)

    def killing(self, batch):
        if self.version == 1:
            os.kill(fleets[0]._seats[0].member.process_id, signal.SIGKILL)
        return step(self, batch)

    def kept(*arguments):
        fleets.append(make(*arguments))
        return fleets[0]

    monkeypatch.setattr(Learner, "step", killing)
    run = train_rl(config, [SingleTurn(Sums())], tmp_path / "run", make_fleet=kept)
    lines = run.read("metrics")
    assert run.finished and [line["step"] for line in lines] == list(range(4))
    assert fleets[0]._seats[0].restarts == 1 and fleets[0].version >= 3
    for line in lines:
        assert line["max_staleness"] <= 2 and not {"env_failure", "aborted"} & set(line["dropped"])


def test_adapters_are_sent_alone(parent, tmp_path):
    config = config_of(parent, steps=2, lora=LoRA(rank=2))
    run = train_rl(config, [SingleTurn(Sums())], tmp_path / "run", make_fleet=engine_processes(config, 1))
    assert [line["step"] for line in run.read("metrics")] == [0, 1]
