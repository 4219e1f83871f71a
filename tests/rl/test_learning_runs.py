"""Whole runs with what a learner may have beside its model: adapters, teachers, replay, measures."""

import dataclasses
import time

import pytest
import torch
from speaker import speaker_model, speaker_tokenizer
from test_learner_options import Text

import glm5
from glm5.envs import Reward, SingleTurn, Task
from glm5.rl import learner
from glm5.rl.adapters import LoRA
from glm5.rl.admission import SchedulerConfig
from glm5.rl.aids import Aids
from glm5.rl.config import RLRunConfig
from glm5.rl.learner import LearnerConfig
from glm5.rl.losses import IcePop
from glm5.rl.orchestrator import train_rl
from glm5.rl.replay import replay_step
from glm5.rl.retention import Retention, forgetting
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.tasks import TaskSource
from glm5.scoring import Grade


class Letters:
    """Reward for an answer that holds an "e"."""

    name = "letters"

    def task(self, seed, index):
        return Task(f"{self.name}/{seed}/{index}", ({"role": "user", "content": f"{index % 5}"},), "e", "one")

    def score(self, task, response):
        said = "e" in (response["content"] or "")
        return Reward(float(said), Grade("correct" if said else "incorrect", "an e" if said else "no e"))


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def config_of(parent, *, group_size=4, **options):
    return RLRunConfig(
        parent=parent, steps=3, rollout=RolloutConfig(max_tokens=6), learner=LearnerConfig(**options),
        scheduler=SchedulerConfig(mode="sync", groups_per_batch=3, group_size=group_size, max_running=12),
    )  # fmt: skip


@pytest.mark.parametrize(("sync", "base"), [("adapters", "full"), ("merged", "int4")])
def test_a_run_that_trains_adapters_ends_in_a_plain_model(parent, tmp_path, sync, base):
    config = config_of(parent, loss=IcePop(), lora=LoRA(sync=sync, base=base))
    run = train_rl(config, [SingleTurn(Letters())], tmp_path / "run")
    lines = run.read("metrics")
    assert all(line["mismatch"] < 1e-4 for line in lines) and lines[0]["grad_norm"] > 0  # engine and learner agree
    before, after = (glm5.load_model(d, dtype=torch.float32).state_dict() for d in (parent, run.model_directory))
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert "model.layers.0.self_attn.q_b_proj.weight" in moved and "lm_head.weight" not in moved


def test_teachers_replay_and_measures_take_part(parent, tmp_path):
    retention = Retention((lambda model: {"norm/bits_per_byte": model.lm_head.weight.norm().item()},), every=2)
    aids = Aids(teachers={"letters": speaker_model(1)}, replay=Text(), retention=retention)
    config = config_of(parent, loss=IcePop(), group_size=2, advantages="none")
    sources = [
        TaskSource(environment="letters", uniform_groups="keep")
    ]  # a teacher has something to say about those too
    run = train_rl(config, [SingleTurn(Letters())], tmp_path / "run", aids=aids, sources=sources)
    lines = run.read("metrics")
    assert [line["trained"] for line in lines] == [6, 6, 6]
    assert all("replay" in line for line in lines)
    assert ["retention/norm/bits_per_byte" in line for line in lines] == [True, False, True]
    [forgotten] = forgetting(lines).values()
    assert forgotten != 0
    assert replay_step(config, run.path, 2, aids=aids).same


def test_the_last_step_is_in_the_metrics_when_the_loop_looks_before_the_learner_is_back(parent, tmp_path, monkeypatch):
    figures = learner.batch_metrics
    monkeypatch.setattr(learner, "batch_metrics", lambda *of: time.sleep(0.5) or figures(*of))
    config = dataclasses.replace(config_of(parent, loss=IcePop()), steps=2)
    run = train_rl(config, [SingleTurn(Letters())], tmp_path / "run")
    assert [line["step"] for line in run.read("metrics")] == [0, 1]
