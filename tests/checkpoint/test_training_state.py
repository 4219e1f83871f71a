"""Training checkpoints: other numbers of processes, saves that fail or go on in the background, what stays."""

import errno
import json
import random

import numpy as np
import pytest
import torch
from spawned import run
from tiny import tiny_model
from torch.distributed.tensor import DTensor

from glm5.checkpoint import training_state
from glm5.checkpoint.training_state import TrainingCheckpoints, load_training_state, read_training_state, state_tensors
from glm5.errors import CheckpointError
from glm5.optim import OptimizerConfig, build_optimizers
from glm5.parallel import ParallelPlan
from glm5.parallel.apply import parallelize
from glm5.parallel.mesh import open_mesh


def start(plan=ParallelPlan(), seed=0, **config):
    model = tiny_model(seed, vocab_size=96)
    parallelize(model, open_mesh(plan))
    return model, build_optimizers(model, model.config, OptimizerConfig(**config))


def take_step(model, optimizers, seed):
    for number, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + number))
        if isinstance(parameter, DTensor):
            gradient = DTensor.from_local(gradient, parameter.device_mesh, run_check=False)
            gradient = gradient.redistribute(placements=parameter.placements)
        parameter.grad = gradient
    for optimizer in optimizers:
        optimizer.step()


def values(model, optimizers):
    return {k: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for k, x in state_tensors(model, optimizers)}


def load_and_save_again(plan, source, target):
    model, optimizers = start(plan, seed=7)
    step = load_training_state(source, model, optimizers)
    TrainingCheckpoints(target).save(step + 1, model, optimizers)
    return values(model, optimizers)


PLANS = {
    "expert": ParallelPlan(data_shard=2, expert=2),
    "expert and fsdp": ParallelPlan(data_shard=4, expert=2),
    "tensor and fsdp": ParallelPlan(data_shard=2, tensor=2),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_value_survives_1_to_n_to_1(name, tmp_path):
    """Weights, router biases and optimiser states, expert by expert: on N processes, and again on one."""
    model, optimizers = start()
    take_step(model, optimizers, 1)
    expected = values(model, optimizers)
    TrainingCheckpoints(tmp_path / "one").save(1, model, optimizers)
    for found in run(
        PLANS[name].devices, load_and_save_again, PLANS[name], tmp_path / "one/step-00000001", tmp_path / "n"
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert load_training_state(tmp_path / "n/step-00000002", *(again := start(seed=9))) == 2
    assert all(torch.equal(value, expected[key]) for key, value in values(*again).items())
    read = read_training_state(tmp_path / "n/step-00000002")
    for key in (key for key in expected if ".experts." in key):
        sums = [x.double().sum((1, 2)) for x in (read[key], expected[key])]
        assert torch.equal(*sums) and len(set(sums[0].tolist())) == 8, key


def test_what_stays(tmp_path):
    model, optimizers = start()
    saved = TrainingCheckpoints(tmp_path)
    for step, value in enumerate([3.0, 1.0, 2.0, None, 4.0], start=1):
        metrics = {} if value is None else {"bits": value}
        saved.save(step, model, optimizers, metrics=metrics, keep=2, keep_best="bits")
    assert [path.name for path in saved.all()] == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_save_in_the_background_holds_the_values_of_its_moment(tmp_path, monkeypatch):
    model, optimizers = start()
    take_step(model, optimizers, 1)
    expected = values(model, optimizers)
    hold = training_state._Writer.write_data
    monkeypatch.setattr(training_state._Writer, "write_data", lambda *a: take_step(model, optimizers, 2) or hold(*a))
    with TrainingCheckpoints(tmp_path) as saved:
        saved.save(1, model, optimizers, wait=False)
    assert not torch.equal(expected["model.lm_head.weight"], model.lm_head.weight)
    found = read_training_state(saved.all()[0])
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path, monkeypatch):
    model, optimizers = start()
    saved = TrainingCheckpoints(tmp_path)
    saved.save(1, model, optimizers)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training_state._Writer, "write_data", full)
        saved.save(2, model, optimizers, wait=False)
        with pytest.raises(
            CheckpointError, match=r"step 2 .*No space left.*newest whole one is step-00000001.*Free some"
        ):
            saved.save(3, model, optimizers)
    assert [path.name for path in saved.all()] == ["step-00000001"]
    saved.save(3, model, optimizers)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    assert load_training_state(saved.all()[-1], model, optimizers) == 3


def test_another_model_or_optimiser_is_refused(tmp_path):
    model, optimizers = start()
    take_step(model, optimizers, 1)
    saved = TrainingCheckpoints(tmp_path)
    saved.save(1, model, optimizers)
    with pytest.raises(CheckpointError, match=r"does not fit: optimizer\..*exp_avg is in the checkpoint only"):
        load_training_state(saved.all()[0], model, [optimizers[0]])
    manifest = json.loads((saved.all()[0] / "manifest.json").read_text())
    (saved.all()[0] / "manifest.json").write_text(json.dumps(manifest | {"kind": "corpus"}))
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        load_training_state(saved.all()[0], model, optimizers)


def test_generators_go_on_where_they_were(tmp_path):
    model, optimizers = start()
    TrainingCheckpoints(tmp_path).save(1, model, optimizers)
    drawn = (random.random(), np.random.rand(), torch.rand(3).tolist())
    load_training_state(tmp_path / "step-00000001", model, optimizers)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == drawn
