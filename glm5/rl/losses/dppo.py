"""DPPO (arXiv 2602.04879) with the KL term of Kimi-K2.5 (arXiv 2602.02276), as prime-rl combines them.

    L = sum_t w_t (- m_t r_t A_t + tau (log r_t)^2),   r = pi_theta / pi(sampler),  d = pi_theta - pi(sampler)
    m = 0 if A > 0 and d > delta_high, or A < 0 and d < -delta_low; else 1

The mask looks at the *difference* of the probabilities, not at their ratio: a rare token may change by a large factor
and a common one may not, and as with PPO only tokens that already went too far in the wanted direction are dropped.
`symmetric` is prime-rl's IPO: m = 0 wherever |d| > delta (the low and the high one for its side). The penalty is on all
tokens, the masked ones too. The bounds are inclusive: a token exactly on one is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glm5.errors import ConfigError
from glm5.rl.loss import PolicyLossResult, PolicyTokens, weighted


@dataclass(frozen=True, kw_only=True)
class DPPO:
    """The loss with prime-rl's defaults."""

    delta_low: float = 0.2
    delta_high: float = 0.2
    tau: float = 1e-3
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not (self.delta_low >= 0 and self.delta_high >= 0 and self.tau >= 0):
            raise ConfigError("DPPO needs delta_low, delta_high and tau of at least 0.")

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`. Diagnostics: share of masked tokens, the penalty before tau."""
        difference_N = tokens.logprobs_N.detach().exp() - tokens.sampled_logprobs_N.exp()
        above_N, below_N = difference_N > self.delta_high, difference_N < -self.delta_low
        if not self.symmetric:
            above_N, below_N = above_N & (tokens.advantages_N > 0), below_N & (tokens.advantages_N < 0)
        kept_N = ~(above_N | below_N)
        log_ratio_N = tokens.logprobs_N - tokens.sampled_logprobs_N
        ratio_N = torch.where(kept_N, log_ratio_N, 0.0).exp() * kept_N
        penalty_N = log_ratio_N.square()
        return PolicyLossResult(
            total=(tokens.weights_N * (self.tau * penalty_N - ratio_N * tokens.advantages_N)).sum(),
            diagnostics={"masked": weighted((~kept_N).float(), tokens), "penalty": weighted(penalty_N, tokens)},
        )
