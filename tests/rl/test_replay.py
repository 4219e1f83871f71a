"""Steps learnt from again without engines; and the sampler says of each token exactly what the trainer says."""

import copy
import dataclasses
import shutil

import lockstep_runs
import pytest
import torch
from scripted import brief_model
from speaker import speaker_tokenizer

import glm5
from glm5.engine import Engine
from glm5.errors import RunError
from glm5.rl.fleet import InProcessFleet
from glm5.rl.losses import CISPO, DDIS
from glm5.rl.orchestrator import train_rl
from glm5.rl.replay import replay_step


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


@pytest.fixture(scope="module")
def resumed(parent, tmp_path_factory):
    """A deterministic run that lost the second half of its journal and went on."""
    path = tmp_path_factory.mktemp("resumed") / "run"
    lockstep_runs.run(parent, path, resume=False)
    shutil.rmtree(path / "model")
    for checkpoint in (path / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    lines = (path / "journal").read_bytes().splitlines(keepends=True)
    (path / "journal").write_bytes(b"".join(lines[: len(lines) // 2]))
    return lockstep_runs.run(parent, path, resume=True)


def test_any_step_is_learnt_from_again_to_the_bit(resumed, parent):
    config = lockstep_runs.config_of(parent)
    for step in (0, 3):
        again = replay_step(config, resumed.path, step)
        assert again.same and again.batch.step == step and again.values["grad_norm"] > 0
    with pytest.raises(RunError, match="holds no batch of step 99"):
        replay_step(config, resumed.path, 99)


def test_another_loss_with_the_same_settings_is_not_that_of_the_run(resumed, parent):
    config = lockstep_runs.config_of(parent)
    assert isinstance(config.learner.loss, DDIS)
    other = CISPO(epsilon_low=config.learner.loss.epsilon_low, epsilon_high=config.learner.loss.epsilon_high)
    config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, loss=other))
    with pytest.raises(RunError, match=r"another config.learner.loss.class \('DDIS', now 'CISPO'\)"):
        replay_step(config, resumed.path, 0)


def test_sampler_and_trainer_agree_exactly_over_turns_swaps_and_resumption(resumed, parent):
    found, swaps = lockstep_runs.differences(lockstep_runs.config_of(parent), resumed)
    assert len(found) > 400 and swaps > 3
    assert torch.equal(found, torch.zeros_like(found))


def test_so_they_do_in_a_strict_asynchronous_run(parent, tmp_path):
    def strict_fleet(model, tokenizer, version):
        return InProcessFleet([Engine(copy.deepcopy(model), tokenizer, strict=True, num_blocks=64, version=version)])

    config = lockstep_runs.config_of(parent, steps=4)
    run = train_rl(config, [lockstep_runs.chat()], tmp_path / "run", make_fleet=strict_fleet)
    found, _ = lockstep_runs.differences(config, run)
    assert len(found) > 300 and torch.equal(found, torch.zeros_like(found))
