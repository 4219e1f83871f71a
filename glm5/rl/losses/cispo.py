"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5): the importance weight is clipped, and no token loses its gradient.

    L = - sum_t w_t sg(clip(r_t, 1 - eps_low, 1 + eps_high)) A_t log pi_theta,   r = pi_theta / pi(sampler)

The paper switches the lower bound off (eps_low of 1) and tunes the upper one without printing it; the default here is a
weight of at most 2. The denominator is the policy that sampled, so one ratio covers staleness and mismatch.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm5.rl.loss import PolicyLossResult, PolicyTokens, weighted
from glm5.rl.losses.ppo import check_clip


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """The loss with its bounds (inclusive)."""

    epsilon_low: float = 1.0
    epsilon_high: float = 1.0

    def __post_init__(self) -> None:
        check_clip("CISPO", self.epsilon_low, self.epsilon_high)

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`. Diagnostics: share of tokens whose weight is held at a bound; they keep a gradient."""
        ratio_N = (tokens.logprobs_N.detach() - tokens.sampled_logprobs_N).exp()
        weight_N = ratio_N.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        return PolicyLossResult(
            total=-(tokens.weights_N * weight_N * tokens.advantages_N * tokens.logprobs_N).sum(),
            diagnostics={"capped": weighted((weight_N != ratio_N).float(), tokens)},
        )
