"""Every loss against closed forms on a tabular softmax policy, the edges of its bounds, and importance sampling."""

import math

import pytest
import torch

from glm5.errors import ConfigError
from glm5.rl.loss import PolicyTokens
from glm5.rl.losses import CISPO, DDIS, DPPO, GSPO, OPSM, PPO, TIS, DecoupledPPO, IcePop, Reinforce

THETA_V = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
ACTION, WEIGHT = 2, 0.25
P = float(THETA_V.softmax(-1)[ACTION])


def tokens_of(logprobs_N, old, sampled, advantages, weights, sequences=None, ages=None):
    """Tokens from plain lists, in double precision."""
    count = len(logprobs_N)
    doubles = (torch.tensor(x, dtype=torch.float64) for x in (old, sampled, advantages, weights))
    wholes = (torch.tensor(x or [0] * count) for x in (sequences, ages))
    return PolicyTokens(logprobs_N, *doubles, *wholes)


def slope_of(loss, *, r, rho, advantage, age=0):
    """d loss / d log pi of one token, where r = pi_theta / pi_old and rho = pi_old / pi(sampler)."""
    theta_V = THETA_V.clone().requires_grad_()
    old = math.log(P) - math.log(r)
    tokens = tokens_of(
        theta_V.log_softmax(-1)[ACTION : ACTION + 1], [old], [old - math.log(rho)], [advantage], [WEIGHT], ages=[age]
    )
    result = loss(tokens)
    result.total.backward()
    direction_V = torch.eye(4, dtype=torch.float64)[ACTION] - THETA_V.softmax(-1)
    slope = float(theta_V.grad[ACTION] / direction_V[ACTION])
    torch.testing.assert_close(theta_V.grad, slope * direction_V)  # a multiple of the score, as any policy gradient
    return slope, {name: float(value) / WEIGHT for name, value in result.diagnostics.items()}


def ppo(r, a, low=0.2, high=0.28):
    """Slope of -min(r A, clip(r) A)."""
    return 0.0 if (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low) else -r * a


def decoupled(r, rho, a, age):
    return 0.0 if rho > 5 else rho * ppo(r, a)


def log_linear(r, rho, a, age):
    share = age / (age + 1)
    c, near = (r * rho) ** share, (r * rho) ** (1 - share)
    return 0.0 if c > 5 else c * ppo(near, a)


def dppo(r, rho, a, symmetric=False):
    full = r * rho
    d = P - P / full
    out = abs(d) > 0.2 if symmetric else (a > 0 and d > 0.2) or (a < 0 and d < -0.2)
    return (0.0 if out else -full * a) + 2e-3 * math.log(full)


CLOSED_FORMS = {
    "DDIS": (DDIS(), lambda r, rho, a, age: -r * rho * a if 0.5 < r * rho < 2 else 0.0),
    "DDIS, narrow": (
        DDIS(epsilon_low=0.2, epsilon_high=0.28),
        lambda r, rho, a, age: -r * rho * a if 0.8 < r * rho < 1.28 else 0.0,
    ),
    "PPO": (PPO(), lambda r, rho, a, age: ppo(r, a)),
    "naive PPO": (PPO(against="sampler"), lambda r, rho, a, age: ppo(r * rho, a)),
    "decoupled": (DecoupledPPO(), decoupled),
    "truncated": (DecoupledPPO(cap=2.0, beyond="truncate"), lambda r, rho, a, age: min(rho, 2.0) * ppo(r, a)),
    "log-linear": (DecoupledPPO(proximal="log-linear"), log_linear),
    "TIS": (TIS(), lambda r, rho, a, age: min(rho, 2.0) * ppo(r, a)),
    "CISPO": (CISPO(), lambda r, rho, a, age: -min(r * rho, 2.0) * a),
    "CISPO, bounded": (CISPO(epsilon_low=0.4), lambda r, rho, a, age: -min(max(r * rho, 0.6), 2.0) * a),
    "GSPO": (GSPO(epsilon_low=0.2), lambda r, rho, a, age: ppo(r * rho, a, 0.2, 4e-4)),
    "GSPO, on-policy": (GSPO(against="trainer"), lambda r, rho, a, age: ppo(r, a, 3e-4, 4e-4)),
    "DPPO": (DPPO(), lambda r, rho, a, age: dppo(r, rho, a)),
    "IPO": (DPPO(symmetric=True), lambda r, rho, a, age: dppo(r, rho, a, symmetric=True)),
    "OPSM": (OPSM(), lambda r, rho, a, age: 0.0 if a < 0 and -math.log(r * rho) > 0.1 else ppo(r * rho, a)),
    "IcePop": (IcePop(), lambda r, rho, a, age: rho * ppo(r, a) if 0.5 <= rho <= 2 else 0.0),
    "REINFORCE": (Reinforce(), lambda r, rho, a, age: -a),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_gradients_equal_the_closed_forms(name):
    loss, closed_form = CLOSED_FORMS[name]
    seen = set()
    for r in (0.3, 0.79, 0.81, 1.0, 1.0003, 1.27, 1.29, 2.7):
        for rho in (0.15, 0.49, 0.51, 0.9, 1.0, 1.7, 2.1, 5.5):
            for advantage in (-1.5, 0.7):
                for age in (0, 1, 4):
                    slope, _ = slope_of(loss, r=r, rho=rho, advantage=advantage, age=age)
                    expected = WEIGHT * closed_form(r, rho, advantage, age)
                    assert slope == pytest.approx(expected, abs=1e-12, rel=1e-9), (r, rho, advantage, age)
                    seen.add(expected == 0)
    masks_nothing = name in ("REINFORCE", "CISPO", "CISPO, bounded", "DPPO", "IPO")  # the penalty is never quite 0
    assert seen == ({False} if masks_nothing else {True, False})


@pytest.mark.parametrize(("loss", "ratio", "kept"), [
    (DDIS(), 2.0, False), (DDIS(), 0.5, False), (DDIS(), 1.999, True), (DDIS(), 0.501, True),
    (IcePop(), 2.0, True), (IcePop(), 0.5, True), (IcePop(), 2.001, False),
    (DecoupledPPO(cap=2.0), 2.0, True), (DecoupledPPO(cap=2.0), 2.001, False),
])  # fmt: skip
def test_the_edge_of_a_mask(loss, ratio, kept):
    one = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sampled = torch.tensor(1.0 / ratio, dtype=torch.float64).log().item()
    result = loss(tokens_of(one, [0.0], [sampled], [1.0], [1.0]))
    result.total.backward()
    assert (one.grad.item() != 0) == kept and result.diagnostics["masked"].item() == (not kept)


@pytest.mark.parametrize(("probability", "kept"), [(0.25, True), (0.2499, False)])
def test_the_edge_of_the_mask_of_probabilities(probability, kept):
    """From 1/4 to 1/2 with a bound of 1/4: exact in binary."""
    one = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    loss = DPPO(delta_high=0.25, tau=0.0)
    loss(tokens_of(one, [0.0], [math.log(probability)], [1.0], [1.0])).total.backward()
    assert (one.grad.item() != 0) == kept


def random_tokens(loss_logprobs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sampled_N, advantages_N = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    return tokens_of(
        loss_logprobs, [0.0] * 40, sampled_N.tolist(), advantages_N.tolist(), [1 / 40] * 40,
        sequences=[i // 8 for i in range(40)],
    )  # fmt: skip


def test_the_gradient_of_ddis_is_that_of_the_masked_ratio_times_the_advantage():
    logprobs_N = (0.3 * torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).double()
    ours_N, theirs_N = (logprobs_N.clone().requires_grad_() for _ in range(2))
    DDIS(epsilon_low=0.3, epsilon_high=0.6)(random_tokens(ours_N)).total.backward()
    tokens = random_tokens(theirs_N)
    ratio_N = (theirs_N - tokens.sampled_logprobs_N).exp()
    kept_N = (ratio_N > 0.7) & (ratio_N < 1.6)
    assert 0 < kept_N.sum() < 40
    (-(tokens.weights_N * torch.where(kept_N, ratio_N, 0) * tokens.advantages_N).sum()).backward()
    torch.testing.assert_close(ours_N.grad, theirs_N.grad)


@pytest.mark.parametrize("loss", [
    PPO(against="sampler"), PPO(), IcePop(beta=3), TIS(), DecoupledPPO(), OPSM(),
    GSPO(epsilon_low=0.3, epsilon_high=0.3), DDIS(), CISPO(), DPPO(tau=0),
    DecoupledPPO(cap=2.0, beyond="truncate"),
])  # fmt: skip
def test_what_is_masked_or_clipped_has_no_gradient_and_all_else_has(loss):
    logprobs_N = torch.randn(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    found = loss(random_tokens(logprobs_N))
    found.total.backward()
    told = sum(float(found.diagnostics.get(name, 0.0)) for name in ("masked", "clipped"))
    assert told == pytest.approx((logprobs_N.grad == 0).sum().item() / 40)


@pytest.mark.parametrize("loss", [CISPO(), TIS(), DecoupledPPO(cap=2.0, beyond="truncate")])
def test_what_is_capped_is_told_as_that(loss):
    """The policy is that of before the batch, so that one ratio is all of them."""
    logprobs_N = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    tokens = random_tokens(logprobs_N)
    above_N = (logprobs_N.detach() - tokens.sampled_logprobs_N).exp() > 2
    told = loss(tokens).diagnostics
    assert 0 < above_N.sum() < 40 and float(told["capped"]) == pytest.approx(above_N.sum().item() / 40)
    assert float(told.get("masked", 0.0)) == 0


def test_gspo_shares_one_ratio_within_a_sequence():
    logprobs_N = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    tokens = random_tokens(logprobs_N)
    GSPO(epsilon_low=1.0, epsilon_high=9.0)(tokens).total.backward()
    for sequence in range(5):
        part = slice(8 * sequence, 8 * sequence + 8)
        s = (logprobs_N.detach()[part] - tokens.sampled_logprobs_N[part]).mean().exp()
        torch.testing.assert_close(logprobs_N.grad[part], -s * tokens.advantages_N[part] / 40)


def test_with_one_advantage_a_sequence_gspo_is_that_of_its_paper():
    """In value, clip and gradient; the paper's own form goes through the mean."""
    generator = torch.Generator().manual_seed(3)
    logprobs_N = 0.1 * torch.randn(40, generator=generator, dtype=torch.float64)
    ours_N, theirs_N = (logprobs_N.clone().requires_grad_() for _ in range(2))
    advantages = [float(1 - 2 * (i // 8 % 2)) for i in range(40)]
    tokens = tokens_of(ours_N, [0.0] * 40, [0.0] * 40, advantages, [1 / 40] * 40, sequences=[i // 8 for i in range(40)])
    found = GSPO(epsilon_low=0.02, epsilon_high=0.02)(tokens).total
    s_S = theirs_N.view(5, 8).mean(1).exp()
    a_S = torch.tensor(advantages[::8], dtype=torch.float64)
    expected = -torch.minimum(s_S * a_S, s_S.clamp(0.98, 1.02) * a_S).mean()
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours_N.grad, theirs_N.grad)
    assert 0 < (ours_N.grad == 0).sum() < 40  # some sequences are clipped


def test_opsm_drops_whole_failed_sequences_that_the_policy_left():
    logprobs_N = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    tokens = tokens_of(
        logprobs_N, [0.0] * 4, [0.3, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0], [0.25] * 4, sequences=[0, 0, 1, 1]
    )  # the first token left by 0.3, so its sequence by 0.15
    assert OPSM(delta=0.1)(tokens).diagnostics["masked"].item() == 0.5
    assert OPSM(delta=0.15)(tokens).diagnostics["masked"].item() == 0
    OPSM(delta=0.1)(tokens).total.backward()
    assert logprobs_N.grad.tolist() == [0.0, 0.0, 0.25, 0.25]


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_token_that_the_sampler_held_impossible_upsets_nothing_where_it_is_bounded(name):
    """An infinite ratio: masks and caps hold it, and an advantage above 0 is clipped."""
    loss, _ = CLOSED_FORMS[name]
    one = torch.full((1,), -1.0, dtype=torch.float64, requires_grad=True)
    result = loss(tokens_of(one, [-1.0], [-math.inf], [1.0], [1.0]))
    result.total.backward()
    if name in ("DPPO", "IPO"):  # a penalty on all tokens is infinite there; the learner's guard takes the step
        assert torch.isposinf(result.total)
    else:
        assert torch.isfinite(result.total) and torch.isfinite(one.grad).all()


SAMPLER_V = torch.tensor([0.9, 0.1, -0.4, -1.2], dtype=torch.float64)
REWARD_V = torch.tensor([0.0, 1.0, 3.0, -2.0], dtype=torch.float64)


def bandit_gradient(loss, *, draws=400_000):
    """Mean gradient over actions drawn by another policy than the one that learns, and its standard error."""
    generator = torch.Generator().manual_seed(5)
    actions_N = torch.multinomial(SAMPLER_V.softmax(-1), draws, replacement=True, generator=generator)
    slopes_V = []
    for action in range(4):
        logprob_1 = THETA_V.log_softmax(-1)[action : action + 1].clone().requires_grad_()
        sampled = SAMPLER_V.log_softmax(-1)[action].item()
        loss(tokens_of(logprob_1, [logprob_1.item()], [sampled], [REWARD_V[action].item()], [1.0])).total.backward()
        slopes_V.append(-logprob_1.grad.item())
    scores_VV = torch.eye(4, dtype=torch.float64) - THETA_V.softmax(-1)
    samples_NV = (torch.tensor(slopes_V, dtype=torch.float64)[:, None] * scores_VV)[actions_N]
    return samples_NV.mean(0), samples_NV.std(0) / math.sqrt(draws)


TRUE_V = THETA_V.softmax(-1) * (REWARD_V - (THETA_V.softmax(-1) * REWARD_V).sum())


@pytest.mark.parametrize("loss", [
    TIS(cap=math.inf), CISPO(epsilon_high=math.inf), DDIS(epsilon_low=1.0, epsilon_high=math.inf),
    DecoupledPPO(cap=math.inf), DPPO(delta_low=1.0, delta_high=1.0, tau=0.0), IcePop(beta=math.inf),
], ids=lambda loss: type(loss).__name__)  # fmt: skip
def test_importance_sampling_without_bounds_is_unbiased(loss):
    """Within five standard errors of the true gradient of the expected reward, which is 40 of them from REINFORCE's."""
    mean_V, error_V = bandit_gradient(loss)
    assert ((mean_V - TRUE_V).abs() < 5 * error_V).all()


@pytest.mark.parametrize("loss", [Reinforce(), PPO(), TIS(cap=1.0), DDIS()], ids=lambda loss: type(loss).__name__)
def test_the_bound_of_that_test_catches_a_biased_estimator(loss):
    mean_V, error_V = bandit_gradient(loss)
    assert ((mean_V - TRUE_V).abs() > 40 * error_V).any()


@pytest.mark.parametrize("make", [
    lambda: DDIS(epsilon_low=1.1), lambda: DDIS(epsilon_high=math.nan), lambda: PPO(epsilon_low=-0.1),
    lambda: PPO(against="me"), lambda: DecoupledPPO(cap=0.5), lambda: DecoupledPPO(beyond="keep"), lambda: TIS(cap=0),
    lambda: CISPO(epsilon_high=-1), lambda: GSPO(against="me"), lambda: DPPO(tau=-1), lambda: OPSM(delta=math.nan),
])  # fmt: skip
def test_wrong_bounds_are_refused(make):
    with pytest.raises(ConfigError):
        make()
