"""TIS, truncated importance sampling: the policy gradient, corrected for who sampled up to a cap.

    L = - sum_t w_t sg(min(pi_old / pi(sampler), cap)) min(r_t A_t, clip(r_t) A_t),   r = pi_theta / pi_old

Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; slime's `--use-tis`. Without
a cap (infinity) and in the first update of a batch this is plain importance sampling: unbiased, of large variance.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm5.errors import ConfigError
from glm5.rl.loss import PolicyLossResult, PolicyTokens, weighted
from glm5.rl.losses.ppo import check_clip, clipped_gain


@dataclass(frozen=True, kw_only=True)
class TIS:
    """The loss with its bounds; the cap is slime's."""

    cap: float = 2.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28

    def __post_init__(self) -> None:
        check_clip("TIS", self.epsilon_low, self.epsilon_high)
        if not self.cap > 0:
            raise ConfigError(f"cap is {self.cap}; TIS needs a number above 0, or infinity.")

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`. Diagnostics: share of tokens at the cap, and of those outside the clip's bounds."""
        weight_N = (tokens.old_logprobs_N - tokens.sampled_logprobs_N).exp().detach()
        gain_N, clipped_N = clipped_gain(
            tokens.logprobs_N - tokens.old_logprobs_N.detach(), tokens.advantages_N, self.epsilon_low, self.epsilon_high
        )
        return PolicyLossResult(
            total=-(tokens.weights_N * weight_N.clamp(max=self.cap) * gain_N).sum(),
            diagnostics={
                "capped": weighted((weight_N > self.cap).float(), tokens),
                "clipped": weighted(clipped_N.float(), tokens),
            },
        )
