"""A critic for PPO: a value head over the model's hidden states, and generalised advantages (GAE, arXiv 1506.02438).

The head reads the state from which the next token is predicted, so V(s_t) is the value before token t. It is a small
network over the *detached* trunk: the policy's weights never learn from the value loss, and the engine, which has no
head, is not concerned. Steps are sampled tokens: prompts and tool results between them take no time. The reward comes
with the last sampled token of each trajectory; where an episode splits into several, each path ends in the episode's
reward.

    delta_t = r_t + gamma V_t+1 - V_t,   A_t = delta_t + gamma lambda A_t+1,   return_t = A_t + V_t
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5.errors import ConfigError
from glm5.model import GLM5, ModelOutput
from glm5.rl.forward import PerExample, by_example, run
from glm5.rl.packing import Example, Passes, Rows, micro_batches
from glm5.train.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class Critic:
    """Discount, horizon and learning of the value head; the values are those of PPO for language models."""

    gamma: float = 1.0
    """What a reward one token later is worth."""
    lam: float = 0.95
    """Of generalised advantage estimation: 1 trusts rewards alone, 0 the values alone."""
    lr: float = 1e-3
    """The value head's own learning rate."""
    clip: float = 0.2
    """A value moves at most this far from its old one before its loss stops pulling; infinity: no bound."""
    whiten: bool = True
    """Bring the advantages of a batch's tokens to mean 0 and deviation 1, repeats counted."""

    def __post_init__(self) -> None:
        check_numbers(self, "lr", above=0)
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1 and self.clip > 0):
            raise ConfigError("A critic needs gamma and lam from 0 to 1 and a clip above 0.")


class ValueHead(nn.Module):
    """[..., D] -> [...]: norm, one hidden layer, zero at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.hidden = nn.Linear(width, width)
        self.value = nn.Linear(width, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.hidden.weight.normal_(0, width**-0.5, generator=generator)
            for parameter in (self.hidden.bias, self.value.weight, self.value.bias):
                parameter.zero_()

    def forward(self, state: Tensor) -> Tensor:
        return self.value(F.silu(self.hidden(self.norm(state.float()))))[..., 0]


@dataclass(frozen=True)
class Estimates:
    """Of every example, before the batch is learnt from."""

    values: PerExample
    advantages: PerExample
    returns: PerExample


def values_of(head: ValueHead, output: ModelOutput, rows: Rows) -> Tensor:
    """V [N] before each sampled token; the trunk takes no gradient."""
    assert output.hidden is not None
    return head(output.hidden.detach()[rows.sampled.rows_N, rows.sampled.columns_N])


@torch.no_grad()
def estimates(head: ValueHead, model: GLM5, examples: Sequence[Example], passes: Passes, config: Critic) -> Estimates:
    """Values, advantages and returns under the head as it is."""
    values: PerExample = {}
    for rows in micro_batches(examples, passes):
        values |= by_example(rows, values_of(head, run(model, rows, passes.attention, {"hidden"}), rows))
    advantages, returns = {}, {}
    for example in examples:
        key = id(example.trajectory)
        advantages[key] = generalised(values[key], example.reward, config.gamma, config.lam)
        returns[key] = advantages[key] + values[key]
    if config.whiten:
        every_N = torch.cat([advantages[id(e.trajectory)].repeat(e.repeats) for e in examples])
        mean, scale = every_N.mean(), every_N.std(correction=0) + 1e-8
        advantages = {key: (some - mean) / scale for key, some in advantages.items()}
    return Estimates(values, advantages, returns)


def generalised(values_T: Tensor, reward: float, gamma: float, lam: float) -> Tensor:
    """GAE [T] of steps with the reward at the end."""
    found = torch.empty_like(values_T)
    following, advantage = 0.0, 0.0
    for t, value in reversed(list(enumerate(values_T.tolist()))):
        delta = (reward if t + 1 == len(values_T) else 0.0) + gamma * following - value
        advantage = delta + gamma * lam * advantage
        found[t], following = advantage, value
    return found


def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, weights_N: Tensor, clip: float) -> Tensor:
    """Half the weighted squared error, the larger of that of the value and of the value within `clip` of the old."""
    near_N = old_N + (values_N - old_N).clamp(-clip, clip)
    error_N = torch.maximum((values_N - returns_N).square(), (near_N - returns_N).square())
    return (weights_N * error_N).sum() / 2
