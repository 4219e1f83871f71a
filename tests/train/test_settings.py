"""Settings that no run can use are refused with one sentence, before anything is written."""

import dataclasses
import math

import pytest
from small_runs import pretrain_config

from glm5.data import Loader, open_dataset
from glm5.errors import ConfigError, DataError, InputError
from glm5.model import GLM5
from glm5.optim import OptimizerConfig
from glm5.train import LoopConfig, SFTConfig, evaluate_bits_per_byte
from glm5.train.dsa import DSAConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(("name", "value"), [
    ("steps", 0), ("steps", 2.5), ("steps", True), ("seed", -1), ("seed", 0.5), ("checkpoint_every", 0),
    ("keep_checkpoints", 0), ("evaluate_every", -1), ("clip_norm", -1), ("clip_norm", 0), ("clip_norm", NAN),
    ("clip_norm", "1"), ("router_bias_rate", NAN), ("router_bias_rate", -0.1), ("spike_factor", 0.5),
    ("spike_factor", NAN), ("precision", "fp16"),
])  # fmt: skip
def test_loop(name, value):
    with pytest.raises(ConfigError, match=f"{name} is "):
        LoopConfig(**{"steps": 1, name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("rows", 0), ("length", 0), ("length", 8.0), ("mtp_steps", -1), ("mtp_weight", INF), ("balance_weight", -1.0),
    ("heldout_documents", 0), ("heldout_documents", -3),
])  # fmt: skip
def test_pretrain(tiny, name, value):
    with pytest.raises(ConfigError, match=f"{name} is "):
        dataclasses.replace(pretrain_config(tiny), **{name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("rows", 0), ("length", 0), ("balance_weight", NAN), ("attention", "spares"),
])  # fmt: skip
def test_sft(tiny, name, value):
    with pytest.raises(ConfigError, match=f"{name} is "):
        SFTConfig(**{"parent": tiny[0], "train_data": tiny[0] / "chat", name: value})


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("length", -2), ("heldout_documents", 0)])
def test_dsa(tiny, name, value):
    with pytest.raises(ConfigError, match=f"{name} is "):
        DSAConfig(**{"parent": tiny[0], "train_data": tiny[0], "heldout_data": tiny[0], name: value})


def test_a_misspelt_choice_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"precision is 'bf61'; use 'fp32' or 'bf16'. Did you mean 'bf16'"):
        LoopConfig(steps=1, precision="bf61")


@pytest.mark.parametrize(("name", "value"), [
    ("lr", 0.0), ("lr", NAN), ("lr", INF), ("eps", 0.0), ("embedding_lr_scale", -1.0), ("weight_decay", NAN),
    ("weight_decay", -0.1), ("momentum", 1.0), ("momentum", NAN), ("betas", (0.9, 1.5)), ("betas", (0.9,)),
])  # fmt: skip
def test_optimizer(name, value):
    with pytest.raises(ConfigError, match=name):
        OptimizerConfig(**{name: value})


def test_loader_and_evaluation(tiny):
    root, config = tiny
    data = open_dataset(root / "heldout")
    with pytest.raises(DataError, match="a row of 0 tokens"):
        Loader(data, rows=1, length=0, seed=0)
    for bad in ({"documents": 0}, {"length": 0}, {"rows": 0}):
        with pytest.raises(InputError, match="at least one document"):
            evaluate_bits_per_byte(GLM5(config), data, **bad)
