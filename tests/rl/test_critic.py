"""The critic: its advantages, its loss, and that the policy does not notice it."""

import dataclasses
import math

import pytest
import torch
from learning import at_version, engine_batch, examples_from
from speaker import speaker_model

from glm5.rl.critic import Critic, ValueHead, estimates, generalised, value_loss
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.losses import PPO
from glm5.rl.objective import objective, totals_of
from glm5.rl.packing import padded
from glm5.rl.records import Batch, Group, Lesson


@pytest.fixture(scope="module")
def batch():
    return engine_batch()


def test_generalised_advantages_equal_their_definition():
    values = torch.tensor([0.3, -0.2, 0.9, 0.4])
    gamma, lam, reward = 0.9, 0.7, 2.0
    following = [*values.tolist()[1:], 0.0]
    deltas = [(reward if t == 3 else 0) + gamma * following[t] - values[t].item() for t in range(4)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 4)) for t in range(4)]
    torch.testing.assert_close(generalised(values, reward, gamma, lam), torch.tensor(expected))
    assert generalised(torch.zeros(3), 1.5, 1.0, 1.0).tolist() == [1.5] * 3  # Monte Carlo
    assert generalised(values, 2.0, 1.0, 1.0).tolist() == pytest.approx([2.0 - v for v in values.tolist()])


def test_a_critic_learns_returns_and_leaves_the_trunk_alone(batch):
    config = LearnerConfig(loss=PPO(), advantages="gae", critic=Critic(lr=3e-3, clip=math.inf, lam=1.0), mtp="frozen")
    learner = Learner(speaker_model(), config)
    values = [learner.step(at_version(batch, version)) for version in range(30)]
    assert values[-1]["value_loss"] < 0.5 * values[0]["value_loss"] and values[0]["critic_grad_norm"] > 0
    some = examples_from(batch, advantages="gae")
    given = learner._given(some, several=False)
    advantages_N = torch.cat(list(given.critic.advantages.values()))
    assert advantages_N.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages_N.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    learner.model.zero_grad(set_to_none=True)
    totals = totals_of(learner.model, some, config.normalisation)
    found = objective(learner.model, learner.head, padded(some), config, given, totals, config.passes)
    found.value.backward()
    assert all(p.grad is None for p in learner.model.parameters())
    raw = estimates(ValueHead(32), learner.model, some, config.passes, Critic(lam=1.0, whiten=False))
    for example in some:  # a head that knows nothing says 0: the advantage is the reward
        assert raw.advantages[id(example.trajectory)].tolist() == [example.reward] * len(example.sampled)


def test_a_clipped_value_does_not_run_away():
    values_N = torch.tensor([0.5, 2.0], requires_grad=True)
    loss = value_loss(values_N, torch.zeros(2), torch.tensor([1.0, 3.0]), torch.ones(2), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx((0.8**2 + 2.8**2) / 2)
    assert values_N.grad.tolist() == [0.0, 0.0]  # both have moved towards their returns by more than the clip


def test_a_repeat_weighs_in_the_whitening_too():
    """As it does in every baseline: a lesson of weight 3 is three rollouts."""
    first, *others = engine_batch().groups[0].lessons
    [trajectory] = first.rollout.trajectories
    copies = [
        Lesson(dataclasses.replace(first.rollout, trajectories=(dataclasses.replace(trajectory),))) for _ in range(3)
    ]
    found = []
    for lessons in ((Lesson(first.rollout, 3), *others), (*copies, *others)):
        some = examples_from(Batch(0, 0, (Group(lessons),)), advantages="gae")
        given = estimates(ValueHead(32), speaker_model(), some, LearnerConfig().passes, Critic())
        found.append([given.advantages[id(e.trajectory)] for e in some])
    repeated, written_out = found
    for one, other in zip(repeated, written_out[2:], strict=True):
        torch.testing.assert_close(one, other)
    assert torch.cat(written_out).mean().abs() < 1e-5 < 1e-2 < torch.cat(repeated).mean().abs()
