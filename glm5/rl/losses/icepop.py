"""IcePop, the loss of GLM-5's reasoning RL (report, section 3.2, eq. 1): GRPO that skips tokens the sampler saw
differently.

    L = - sum_t w_t pop(rho_t) min(r_t A_t, clip(r_t, 1 - eps_low, 1 + eps_high) A_t)
    rho = pi_old(trainer) / pi(sampler),  pop(rho) = rho if 1/beta <= rho <= beta else 0
    r = pi_theta / pi_old

rho measures the mismatch between trainer and sampler on the same weights; a token where they disagree by more than
beta is masked. There is no KL term. pop(rho) is a constant: no gradient flows through it. The bounds are inclusive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glm5.errors import ConfigError
from glm5.rl.loss import PolicyLossResult, PolicyTokens, weighted
from glm5.rl.losses.ppo import held


@dataclass(frozen=True, kw_only=True)
class IcePop:
    """The loss with its bounds; the defaults are the report's."""

    beta: float = 2.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28

    def __post_init__(self) -> None:
        if not (self.beta >= 1 and 0 <= self.epsilon_low <= 1 and self.epsilon_high >= 0):  # so NaN fails too
            raise ConfigError(
                "IcePop needs beta of at least 1, epsilon_low from 0 to 1 and epsilon_high of at least 0."
            )

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`. Diagnostics: mean mismatch, share of masked and of clipped tokens."""
        rho_N = (tokens.old_logprobs_N - tokens.sampled_logprobs_N).exp().detach()
        kept_N = (rho_N >= 1 / self.beta) & (rho_N <= self.beta)
        pop_N = torch.where(kept_N, rho_N, 0.0)
        # A masked token's ratio may be infinite, and 0 times infinity is no number: it is taken out before exp.
        ratio_N = torch.where(kept_N, tokens.logprobs_N - tokens.old_logprobs_N.detach(), 0.0).exp()
        clipped_N = ratio_N.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        gain_N = torch.minimum(ratio_N * tokens.advantages_N, clipped_N * tokens.advantages_N)
        mismatch_N = (tokens.old_logprobs_N - tokens.sampled_logprobs_N).abs()
        return PolicyLossResult(
            total=-(tokens.weights_N * pop_N * gain_N).sum(),
            diagnostics={
                "mismatch": weighted(mismatch_N, tokens),
                "masked": weighted((~kept_N).float(), tokens),
                "clipped": weighted(
                    held(ratio_N, tokens.advantages_N, self.epsilon_low, self.epsilon_high).float(), tokens
                ),
            },
        )
