"""Steps learnt from again without engines; and the sampler says of each token exactly what the trainer says."""

import copy
import shutil

import lockstep_runs
import pytest
import torch
from scripted import brief_model
from speaker import speaker_tokenizer

import glm5
from glm5.engine import Engine
from glm5.engine.strict import strict_logprobs
from glm5.errors import RunError
from glm5.rl.fleet import InProcessFleet
from glm5.rl.learner import Learner
from glm5.rl.orchestrator import train_rl
from glm5.rl.replay import batches_of, replay_step


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


def differences(config, run):
    """Over every trained token: how many, the largest difference of sampler and trainer under the weights that made it;
    and how many trajectories are of several versions."""
    learner = Learner(glm5.load_model(config.parent, dtype=torch.float32), config.learner)
    snapshots, tokens, largest, mixed = {}, 0, 0.0, 0
    for batch in batches_of(run.path / "journal"):
        snapshots[batch.version] = copy.deepcopy(learner.model).eval()
        for old in [v for v in snapshots if v < batch.version - config.scheduler.max_staleness]:
            del snapshots[old]
        for rollout in batch.rollouts:
            for t in rollout.trajectories:
                made = sorted({v for v, s in zip(t.versions, t.sampled, strict=True) if s})
                mixed += len(made) > 1
                assert t.sampled.index(True) > learner.model.config.index_topk  # so every token selects
                for version in made:
                    trained = strict_logprobs(snapshots[version], t.token_ids).tolist()
                    for i, (sampled, own) in enumerate(zip(t.sampled, t.versions, strict=True)):
                        if sampled and own == version:
                            tokens, largest = tokens + 1, max(largest, abs(t.logprobs[i] - trained[i - 1]))
        learner.step(batch)
    return tokens, largest, mixed


def test_sampler_and_trainer_agree_exactly_over_turns_swaps_and_resumption(resumed, parent):
    tokens, largest, mixed = differences(lockstep_runs.config_of(parent), resumed)
    assert tokens > 400 and mixed > 3
    assert largest == 0.0


def test_so_they_do_in_a_strict_asynchronous_run(parent, tmp_path):
    def strict_fleet(model, tokenizer, version):
        return InProcessFleet([Engine(copy.deepcopy(model), tokenizer, strict=True, num_blocks=64, version=version)])

    config = lockstep_runs.config_of(parent, steps=4)
    run = train_rl(config, [lockstep_runs.chat()], tmp_path / "run", make_fleet=strict_fleet)
    tokens, largest, _ = differences(config, run)
    assert tokens > 300 and largest == 0.0
