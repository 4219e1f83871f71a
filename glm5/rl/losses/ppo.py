"""The clipped objective of PPO (arXiv 1707.06347), as GRPO uses it (arXiv 2402.03300, without its KL term).

    L = - sum_t w_t min(r_t A_t, clip(r_t, 1 - eps_low, 1 + eps_high) A_t)

`against="trainer"`: r = pi_theta / pi_old, the trainer's own policy before the batch, as on-policy GRPO has it; it
neither sees staleness nor mismatch. `against="sampler"`: r = pi_theta / pi(sampler), the naive PPO of asynchronous
runs, whose trust region lies around a policy that is long gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glm5.errors import ConfigError
from glm5.rl.loss import PolicyLossResult, PolicyTokens, weighted


@dataclass(frozen=True, kw_only=True)
class PPO:
    """The loss with its bounds (inclusive); the upper one is that of GLM-5's reasoning RL."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    against: Literal["trainer", "sampler"] = "trainer"

    def __post_init__(self) -> None:
        check_clip("PPO", self.epsilon_low, self.epsilon_high)
        if self.against not in ("trainer", "sampler"):
            raise ConfigError(f"against is {self.against!r}; use 'trainer' or 'sampler'.")

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`. Diagnostics: share of tokens without a gradient, outside the bounds."""
        base_N = tokens.old_logprobs_N if self.against == "trainer" else tokens.sampled_logprobs_N
        gain_N, clipped_N = clipped_gain(
            tokens.logprobs_N - base_N.detach(), tokens.advantages_N, self.epsilon_low, self.epsilon_high
        )
        return PolicyLossResult(
            total=-(tokens.weights_N * gain_N).sum(), diagnostics={"clipped": weighted(clipped_N.float(), tokens)}
        )


def clipped_gain(log_ratio_N: Tensor, advantages_N: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A) and where the clip takes the gradient: r is out of bounds on the side to which A pulls.

    So it is where the ratio is infinite and A above 0. On the other side the gradient is that of r A.
    """
    flat_N = torch.isposinf(log_ratio_N) & (advantages_N >= 0)  # min takes the bound; infinity would make 0 x inf
    ratio_N = torch.where(flat_N, 0.0, log_ratio_N).exp()
    clipped_N = torch.where(flat_N, 1 + high, ratio_N.clamp(1 - low, 1 + high))
    gain_N = torch.minimum(torch.where(flat_N, clipped_N, ratio_N) * advantages_N, clipped_N * advantages_N)
    return gain_N, held(torch.where(flat_N, torch.inf, ratio_N), advantages_N, low, high)


def held(ratio_N: Tensor, advantages_N: Tensor, low: float, high: float) -> Tensor:
    """Where the clip leaves no gradient, bool [N]."""
    return ((ratio_N > 1 + high) & (advantages_N > 0)) | ((ratio_N < 1 - low) & (advantages_N < 0))


def check_clip(name: str, low: float, high: float) -> None:
    """Raises ConfigError for bounds that are none; NaN is none."""
    if not (0 <= low <= 1 and high >= 0):
        raise ConfigError(f"{name} needs epsilon_low from 0 to 1 and epsilon_high of at least 0.")
