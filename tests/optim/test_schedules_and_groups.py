"""Schedules at their corners, parameter groups, and the router's bias."""

import itertools

import pytest
import torch
from torch import nn

from glm5.config import PRESETS
from glm5.errors import ConfigError
from glm5.optim import Muon, OptimizerConfig, Schedule, build_optimizers, rate_at, set_rate, update_router_bias


def test_warmup_then_cosine():
    schedule = Schedule(shape="cosine", warmup_steps=4, final_fraction=0.1)
    rates = [rate_at(schedule, step, 25) for step in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.55)  # half way between 4 and 24
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_linear_and_constant():
    linear = Schedule(shape="linear", final_fraction=0.25)
    assert [rate_at(linear, step, 4) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rate_at(Schedule(shape="constant"), 999, 1000) == 1.0


@pytest.mark.parametrize(
    "bad", [{"shape": "cosin"}, {"warmup_steps": -1}, {"warmup_steps": 1.5}, {"final_fraction": 2.0}]
)
def test_bad_schedules_are_refused(bad):
    with pytest.raises(ConfigError):
        Schedule(**bad)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.q_a_proj = nn.Linear(4, 4, bias=True)
        self.norm = nn.RMSNorm(4)
        self.frozen = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.frozen.requires_grad_(False)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_trainable_parameter_has_one_owner(name):
    model = Toy()
    optimizers = build_optimizers(model, PRESETS["nano"](), OptimizerConfig(name=name, embedding_lr_scale=2.0))
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(owned) == len({id(p) for p in owned})
    decayed = {id(p) for o in optimizers for g in o.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert decayed == {id(model.q_a_proj.weight)}
    assert isinstance(optimizers[0], Muon) == (name == "muon")
    set_rate(optimizers, 0.5)
    rates = {round(g["lr"], 12) for o in optimizers for g in o.param_groups}
    assert rates == {1e-4, 2e-4}


def test_nothing_to_train_is_refused():
    model = Toy().requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        build_optimizers(model, PRESETS["nano"](), OptimizerConfig())


def test_router_bias_moves_towards_the_mean_load():
    bias = torch.zeros(4)
    update_router_bias(bias, torch.tensor([5.0, 1.0, 3.0, 3.0]), 0.001)
    assert torch.equal(bias, torch.tensor([-0.001, 0.001, 0.0, 0.0]))
