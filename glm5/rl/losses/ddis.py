"""DDIS, direct double-sided importance sampling: the loss of GLM-5's asynchronous agentic RL (report, 4.1.2, eq. 3-5).

    L = - sum_t w_t sg(f(r_t)) A_t log pi_theta,   r = pi_theta / pi(sampler)
    f(r) = r if 1 - eps_low < r < 1 + eps_high else 0

There is no third policy: the ratio is taken straight to what the sampler reported, so one number covers staleness and
the mismatch of trainer and sampler alike. f is a constant here (`sg`); the report does not say so, but that reading is
the only one whose gradient is a policy gradient: it equals the gradient of r A over the tokens that are kept, because
the gradient of r is r times that of log pi. Unlike the clip of PPO, a token out of bounds is dropped in the harmless
direction too. The bounds are exclusive, as printed.

The report gives no bounds for agentic RL. The defaults are 1/2 < r < 2, the band that it allows the same quantity in
reasoning RL (beta = 2 of IcePop): narrow bounds such as PPO's 0.2 would drop most of what an old policy said.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glm5.errors import ConfigError
from glm5.rl.loss import PolicyLossResult, PolicyTokens, weighted


@dataclass(frozen=True, kw_only=True)
class DDIS:
    """The loss with its bounds; the default of asynchronous runs."""

    epsilon_low: float = 0.5
    epsilon_high: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.epsilon_low <= 1 and self.epsilon_high >= 0):
            raise ConfigError("DDIS needs epsilon_low from 0 to 1 and epsilon_high of at least 0.")

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`. Diagnostics: share of masked tokens, mean of f."""
        ratio_N = (tokens.logprobs_N.detach() - tokens.sampled_logprobs_N).exp()
        kept_N = (ratio_N > 1 - self.epsilon_low) & (ratio_N < 1 + self.epsilon_high)
        f_N = torch.where(kept_N, ratio_N, 0.0)
        logprobs_N = torch.where(kept_N, tokens.logprobs_N, 0.0)
        return PolicyLossResult(
            total=-(tokens.weights_N * f_N * tokens.advantages_N * logprobs_N).sum(),
            diagnostics={"masked": weighted((~kept_N).float(), tokens), "kept_ratio": weighted(f_N, tokens)},
        )
