"""IcePop and its surroundings against closed forms on a tabular softmax policy."""

import math

import pytest
import torch

from glm5.errors import ConfigError
from glm5.rl.advantages import group_advantages
from glm5.rl.loss import PolicyTokens, token_weights
from glm5.rl.losses import IcePop


def one_token(theta_V, action, *, old, sampled, advantage, weight, loss):
    """Gradient of the loss of one token with respect to the policy's logits."""
    theta_V = theta_V.clone().requires_grad_()
    tokens = PolicyTokens(
        logprobs_N=theta_V.log_softmax(-1)[action : action + 1],
        old_logprobs_N=torch.tensor([old], dtype=torch.float64),
        sampled_logprobs_N=torch.tensor([sampled], dtype=torch.float64),
        advantages_N=torch.tensor([advantage], dtype=torch.float64),
        weights_N=torch.tensor([weight], dtype=torch.float64),
        sequences_N=torch.zeros(1, dtype=torch.int64),
        ages_N=torch.zeros(1, dtype=torch.int64),
    )
    result = loss(tokens)
    result.total.backward()
    return result, theta_V.grad


@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0])
@pytest.mark.parametrize("rho", [0.3, 0.51, 1.0, 1.99, 2.5])
@pytest.mark.parametrize("advantage", [-1.5, 0.7])
def test_gradient_equals_the_closed_form(ratio, rho, advantage):
    theta_V = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
    policy_V = theta_V.softmax(-1)
    action, weight = 2, 0.25
    old = float(policy_V[action].log()) - math.log(ratio)
    result, gradient_V = one_token(
        theta_V, action, old=old, sampled=old - math.log(rho), advantage=advantage, weight=weight, loss=IcePop()
    )
    kept = 0.5 <= rho <= 2
    flat = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)  # where min picks the clipped side
    one_hot_V = torch.eye(4, dtype=torch.float64)[action]
    slope = 0.0 if not kept or flat else -weight * rho * ratio * advantage
    torch.testing.assert_close(gradient_V, slope * (one_hot_V - policy_V), atol=1e-12, rtol=1e-9)
    clipped = min(max(ratio, 0.8), 1.28)
    value = -weight * rho * min(ratio * advantage, clipped * advantage) if kept else 0.0
    assert result.total.item() == pytest.approx(value, abs=1e-12)
    assert result.diagnostics["masked"].item() == pytest.approx(0.0 if kept else weight)
    assert result.diagnostics["mismatch"].item() == pytest.approx(weight * abs(math.log(rho)))


@pytest.mark.parametrize(("rho", "masked"), [(2.0, 0), (0.5, 0), (2.001, 1), (0.499, 1)])
def test_the_bounds_of_the_mask_are_inclusive(rho, masked):
    values = (torch.tensor([x], dtype=torch.float64) for x in (0.0, math.log(rho), 0.0, 1.0, 1.0))
    tokens = PolicyTokens(*values, *torch.zeros(2, 1, dtype=torch.int64))
    assert IcePop()(tokens).diagnostics["masked"].item() == masked


def test_a_token_the_sampler_held_impossible_is_masked_without_nan():
    result, gradient_V = one_token(
        torch.zeros(3, dtype=torch.float64), 0, old=-1.0, sampled=-math.inf, advantage=1.0, weight=1.0, loss=IcePop()
    )
    assert result.total.item() == 0 and gradient_V.abs().max() == 0
    result, gradient_V = one_token(
        torch.zeros(3, dtype=torch.float64), 0, old=-2000.0, sampled=-1.0, advantage=1.0, weight=1.0, loss=IcePop()
    )
    assert result.total.item() == 0 and torch.isfinite(gradient_V).all() and gradient_V.abs().max() == 0


def test_on_policy_it_is_the_plain_policy_gradient():
    theta_V = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    old = float(theta_V.log_softmax(-1)[1])
    _, gradient_V = one_token(theta_V, 1, old=old, sampled=old, advantage=2.0, weight=1.0, loss=IcePop())
    expected_V = -2.0 * (torch.eye(3, dtype=torch.float64)[1] - theta_V.softmax(-1))
    torch.testing.assert_close(gradient_V, expected_V)


def test_wrong_bounds_are_refused():
    for wrong in ({"beta": 0.5}, {"beta": math.nan}, {"epsilon_low": -0.1}, {"epsilon_low": 1.1}, {"epsilon_high": -1}):
        with pytest.raises(ConfigError, match="IcePop needs"):
            IcePop(**wrong)


def test_group_advantages():
    assert group_advantages([1.0, 1.0, 1.0]) is None
    assert group_advantages([1.0, 0.0], normalise=False) == [0.5, -0.5]
    advantages = group_advantages([1.0, 0.0, 0.0, 0.0])
    assert sum(advantages) == pytest.approx(0, abs=1e-9)
    assert advantages[0] == pytest.approx(0.75 / math.sqrt(3 / 16), rel=1e-4)
    with pytest.raises(ValueError, match="finite"):
        group_advantages([math.nan, 1.0])


def test_the_weights_of_a_step_add_up_to_one():
    lengths = [3, 1, 6]
    for kind in ("sequence-mean", "token-mean"):
        weights = token_weights(lengths, kind)
        assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1)
    assert token_weights(lengths, "token-mean") == [0.1] * 3
    assert token_weights(lengths, "sequence-mean") == pytest.approx([1 / 9, 1 / 3, 1 / 18])
