"""FSDP, HSDP and expert parallel against one process: loss, every gradient, every expert's load."""

import pytest
import torch
from spawned import run
from steps import steps

from glm5.parallel import ParallelPlan


@pytest.fixture(scope="module")
def alone():
    return steps(ParallelPlan())


def assert_equal(result, expected):
    torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-6, atol=0)
    assert result["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (result["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, (name, error)
    for layer, load in expected["loads"].items():
        assert torch.equal(result["loads"][layer], load), layer


PLANS = {
    "fsdp": ParallelPlan(data_shard=2),
    "hsdp": ParallelPlan(data_replicate=2, data_shard=2),
    "expert": ParallelPlan(data_shard=2, expert=2),
    "expert and fsdp": ParallelPlan(data_shard=4, expert=2),
}


@pytest.mark.parametrize("name", PLANS)
def test_many_processes_equal_one(alone, name):
    for results in run(PLANS[name].devices, steps, PLANS[name]):
        for kind, expected in alone.items():
            assert_equal(results[kind], expected)


def test_bf16_gathers_stay_near(alone):
    """Weights gathered in bf16, gradients summed in fp32: near the loss of fp32, and gradients in fp32."""
    for results in run(2, steps, ParallelPlan(data_shard=2), torch.bfloat16):
        for kind, expected in alone.items():
            torch.testing.assert_close(results[kind]["loss"], expected["loss"], rtol=2e-2, atol=0)
            assert all(g.dtype == torch.float32 for g in results[kind]["gradients"].values())
