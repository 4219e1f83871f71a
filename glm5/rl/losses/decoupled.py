"""Decoupled PPO (arXiv 2110.00641), the objective of AReaL (arXiv 2505.24298): behind old samples, a near trust region.

    L = - sum_t w_t sg(c_t) min(r_t A_t, clip(r_t, 1 - eps_low, 1 + eps_high) A_t)
    r = pi_theta / pi_prox,   c = pi_prox / pi(sampler)

The clip is around a recent *proximal* policy; c corrects for who sampled. A token whose c is above `cap` is left out,
or held at the cap; either way its weight stays in the denominator, so a step with many such tokens is a smaller step.

The proximal policy is the trainer's before the batch ("recomputed"), which costs a forward pass when a batch is learnt
from in several updates. "log-linear" guesses it on the line from the sampler to the policy that is being trained, by
their versions: log prox = log sampler + a (log theta - log sampler), a = age / (age + 1), where theta counts as one
version after the proximal policy. A token of age 0 was sampled by the proximal policy itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from glm5.errors import ConfigError
from glm5.rl.loss import PolicyLossResult, PolicyTokens, weighted
from glm5.rl.losses.ppo import check_clip, clipped_gain


@dataclass(frozen=True, kw_only=True)
class DecoupledPPO:
    """The loss with its bounds; the cap is AReaL's."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    cap: float = 5.0
    beyond: Literal["mask", "truncate"] = "mask"
    """What becomes of a token whose correction is above the cap (inclusive)."""
    proximal: Literal["recomputed", "log-linear"] = "recomputed"

    def __post_init__(self) -> None:
        check_clip("DecoupledPPO", self.epsilon_low, self.epsilon_high)
        if not self.cap >= 1:
            raise ConfigError(f"cap is {self.cap}; DecoupledPPO needs at least 1, so that on-policy tokens are kept.")
        if self.beyond not in ("mask", "truncate") or self.proximal not in ("recomputed", "log-linear"):
            raise ConfigError("DecoupledPPO takes beyond='mask' or 'truncate', proximal='recomputed' or 'log-linear'.")

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`. Diagnostics: share of tokens beyond the cap (masked, or capped as `beyond` says),
        and outside the bounds."""
        proximal_N = tokens.old_logprobs_N.detach()
        if self.proximal == "log-linear":
            share_N = (tokens.ages_N / (tokens.ages_N + 1)).to(proximal_N.dtype)
            behind_N = tokens.sampled_logprobs_N
            proximal_N = behind_N + share_N * (tokens.logprobs_N.detach() - behind_N)
        correction_N = (proximal_N - tokens.sampled_logprobs_N).exp()
        kept_N = correction_N <= self.cap
        beyond = 0.0 if self.beyond == "mask" else self.cap
        correction_N = torch.where(kept_N, correction_N, beyond)
        log_ratio_N = torch.where(correction_N > 0, tokens.logprobs_N - proximal_N, 0.0)
        gain_N, clipped_N = clipped_gain(log_ratio_N, tokens.advantages_N, self.epsilon_low, self.epsilon_high)
        return PolicyLossResult(
            total=-(tokens.weights_N * correction_N * gain_N).sum(),
            diagnostics={
                "masked" if self.beyond == "mask" else "capped": weighted((~kept_N).float(), tokens),
                "clipped": weighted(clipped_N.float(), tokens),
            },
        )
