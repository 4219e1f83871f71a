"""GSPO (arXiv 2507.18071): one ratio for a whole sequence, the geometric mean of its tokens' ratios, under PPO's clip.

    L = - sum_t w_t min(s_t A_t, clip(s_t, 1 - eps_low, 1 + eps_high) A_t)
    s_t = sg(s) pi_theta / sg(pi_theta),   s = exp(mean_t(log pi_theta - log pi_base))

This is GSPO-token (section 4.3): where all tokens of a sequence have one advantage, it is GSPO in value, clip and
gradient; where they have their own (critic, teachers, a penalty), each moves its token and not the mean of all.

The sequence is a trajectory: what was sampled in one context. The mean moves far less than a single token, hence the
narrow bounds, those of the paper's section 5.1 as TRL quotes them. `against="sampler"` (default) lets s see staleness
too; "trainer" is the paper's on-policy setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glm5.errors import ConfigError
from glm5.rl.loss import PolicyLossResult, PolicyTokens, sequence_means, weighted
from glm5.rl.losses.ppo import check_clip, clipped_gain


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """The loss with its bounds (inclusive)."""

    epsilon_low: float = 3e-4
    epsilon_high: float = 4e-4
    against: Literal["trainer", "sampler"] = "sampler"

    def __post_init__(self) -> None:
        check_clip("GSPO", self.epsilon_low, self.epsilon_high)
        if self.against not in ("trainer", "sampler"):
            raise ConfigError(f"against is {self.against!r}; use 'trainer' or 'sampler'.")

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`. Diagnostics: share of tokens in clipped sequences."""
        base_N = tokens.old_logprobs_N if self.against == "trainer" else tokens.sampled_logprobs_N
        now_N = tokens.logprobs_N.detach()
        log_ratio_N = sequence_means(now_N - base_N.detach(), tokens) + (tokens.logprobs_N - now_N)
        gain_N, clipped_N = clipped_gain(log_ratio_N, tokens.advantages_N, self.epsilon_low, self.epsilon_high)
        return PolicyLossResult(
            total=-(tokens.weights_N * gain_N).sum(), diagnostics={"clipped": weighted(clipped_N.float(), tokens)}
        )
