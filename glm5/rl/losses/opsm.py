"""OPSM, off-policy sequence masking (DeepSeek-V3.2 report, arXiv 2512.02556; slime's `--use-opsm`), around PPO's clip.

A whole sequence is dropped if its advantage is below 0 and the policy moved away from it: mean_t(log pi(sampler) - log
pi_theta) > delta. Learning from failures that the present policy would hardly make is what upsets a run; successes of
old policies are kept. The bound is inclusive, the sequence is a trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glm5.errors import ConfigError
from glm5.rl.loss import PolicyLossResult, PolicyTokens, sequence_means, weighted
from glm5.rl.losses.ppo import check_clip, clipped_gain


@dataclass(frozen=True, kw_only=True)
class OPSM:
    """PPO's loss with the mask over sequences."""

    delta: float = 0.1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28

    def __post_init__(self) -> None:
        check_clip("OPSM", self.epsilon_low, self.epsilon_high)
        if not self.delta >= 0:
            raise ConfigError(f"delta is {self.delta}; OPSM needs at least 0.")

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`. Diagnostics: share of tokens in masked sequences, and of those outside the bounds."""
        away_N = sequence_means(tokens.sampled_logprobs_N - tokens.logprobs_N.detach(), tokens)
        kept_N = ~((tokens.advantages_N < 0) & (away_N > self.delta))
        log_ratio_N = torch.where(kept_N, tokens.logprobs_N - tokens.sampled_logprobs_N, 0.0)
        gain_N, clipped_N = clipped_gain(log_ratio_N, tokens.advantages_N, self.epsilon_low, self.epsilon_high)
        return PolicyLossResult(
            total=-(tokens.weights_N * gain_N * kept_N).sum(),
            diagnostics={
                "masked": weighted((~kept_N).float(), tokens),
                "clipped": weighted(clipped_N.float(), tokens),
            },
        )
