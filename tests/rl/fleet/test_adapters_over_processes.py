"""Runs over engines in processes to which the adapters alone are sent."""

import pytest
from fleet_engines import Letters
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import SingleTurn
from glm5.optim import OptimizerConfig
from glm5.rl.adapters import LoRA
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.executors import engine_processes
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def test_adapters_are_sent_alone(parent, tmp_path):
    learner = LearnerConfig(optimizer=OptimizerConfig(name="adamw", lr=1e-3), rows=8, lora=LoRA(rank=2))
    config = RLRunConfig(
        parent=parent, steps=2, rollout=RolloutConfig(max_tokens=8), learner=learner,
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=4, max_running=8, max_staleness=2),
    )  # fmt: skip
    run = train_rl(config, [SingleTurn(Letters())], tmp_path / "run", make_fleet=engine_processes(config, 1))
    assert [line["step"] for line in run.read("metrics")] == [0, 1]
