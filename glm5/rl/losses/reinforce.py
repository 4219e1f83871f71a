"""REINFORCE (Williams 1992): L = - sum_t w_t A_t log pi_theta. On-policy; nothing corrects or bounds it.

With advantages of the kind "reinforce++" the report of that name takes PPO's clip instead: `PPO` with them is
REINFORCE++ (arXiv 2501.03262).
"""

from __future__ import annotations

from dataclasses import dataclass

from glm5.rl.loss import PolicyLossResult, PolicyTokens


@dataclass(frozen=True)
class Reinforce:
    """The plain policy gradient."""

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """See `PolicyLoss`."""
        return PolicyLossResult(
            total=-(tokens.weights_N * tokens.advantages_N * tokens.logprobs_N).sum(), diagnostics={}
        )
