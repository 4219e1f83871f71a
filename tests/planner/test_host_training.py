"""Training memory of one FP32 process: the counts against autograd's own, and the plan against measured peaks."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.memory import GIVING_BACK
from glm5.config import ModelConfig
from glm5.data import Batch
from glm5.errors import InputError
from glm5.model import GLM5, LOGITS
from glm5.planner import HostTrainingMemory, TrainingPlan, hardware_from, host_training_memory
from glm5.train.loop import LoopConfig, Stage, prepare
from glm5.train.losses import language_loss

NANO = ModelConfig.from_preset("nano")
ROOT = Path(__file__).parents[2]


def plan(config: ModelConfig = NANO, **sizes: object) -> HostTrainingMemory:
    parallel = TrainingPlan(precision="fp32", **sizes)  # type: ignore[arg-type]
    return host_training_memory(config, parallel, hardware_from("CPU24GB"))


def saved_bytes(config: ModelConfig, length: int, *, mtp: bool, checkpointing: bool) -> int:
    """Bytes of all tensors that a forward pass of pre-training keeps for backward, parameters not counted."""
    model = GLM5(config)
    loss = functools.partial(language_loss, attention="dense", mtp_weight=0.3 if mtp else 0.0, balance_weight=1e-4)
    stage = Stage(name="count", loader=None, loss=loss, learns=lambda name: ".indexer." not in name)  # type: ignore[arg-type]
    prepare(stage, model, LoopConfig(steps=1, checkpoint_activations=checkpointing))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    ids_BT = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss(model, Batch(ids_BT, ids_BT.roll(-1, 1), torch.zeros_like(ids_BT)))
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_formula_counts_what_autograd_keeps(mtp, checkpointing):
    config = dataclasses.replace(NANO, num_nextn_predict_layers=int(mtp))
    length = 128
    log_softmax = 4 * length * config.vocab_size * (1 + mtp)
    planned = plan(config, sequence=length, mtp=mtp, checkpointing=checkpointing).saved_activations.value
    found = saved_bytes(config, length, mtp=mtp, checkpointing=checkpointing) - log_softmax
    assert planned == pytest.approx(found, rel=0.03)


def test_states_by_hand():
    indexers = sum(p.numel() for name, p in GLM5(NANO).named_parameters() if ".indexer." in name)
    weights = sum(p.numel() for p in GLM5(NANO).parameters())
    tables = 2 * NANO.vocab_size * NANO.hidden_size
    adamw, muon = (plan(optimizer=optimizer) for optimizer in ("adamw", "muon"))
    assert adamw.weights.value == 4 * weights
    assert adamw.gradients.value == 4 * (weights - indexers)
    assert adamw.optimizer.value == 8 * (weights - indexers)
    assert muon.optimizer.value == pytest.approx(4 * (weights - indexers) + 4 * tables, rel=0.01)


def test_logits_of_one_piece_where_all_would_be_too_many():
    """The bound is that of `glm5 train`: 256 MiB over trunk and draft step; beyond it those of one head, at most."""
    published = dataclasses.replace(NANO, vocab_size=154_880)
    longest = LOGITS // (2 * 154_880)
    fits, more, many = (plan(published, sequence=length).logits.value for length in (longest, longest + 1, 2048))
    assert fits == 4 * 4 * longest * 154_880
    table = 4 * 128 * 154_880
    assert (more, many) == (3 * 4 * (longest + 1) * 154_880 + 2 * table, 3 * (256 << 20) + 2 * table)
    kept = [plan(published, sequence=n, checkpointing=True).layer_activations.value for n in (longest, longest + 1)]
    assert kept[0] - kept[1] == pytest.approx(4 * longest * 154_880, rel=0.02)  # the trunk's no longer wait


def test_more_processes_are_refused():
    with pytest.raises(InputError, match="one process on one machine"):
        plan(data_shard=2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("optimizer", "checkpointing"),
    [("muon", "False"), pytest.param("adamw", "True", marks=pytest.mark.soak)],
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(optimizer, checkpointing):
    """Without what any process holds: that part is a constant of the installation. T = 1,024."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", "--presets", "nano", "--lengths", "1024"]
    command += ["--optimizers", optimizer, "--checkpointing", checkpointing]
    environment = {**os.environ, **GIVING_BACK}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    planned = plan(optimizer=optimizer, sequence=1024, checkpointing=checkpointing == "True")
    own = planned.total.value - planned.process.value
    assert own == pytest.approx(found["peak"] - found["process"], rel=0.15)
