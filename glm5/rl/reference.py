"""The divergence from a reference policy, estimated on sampled tokens (Schulman 2020, "Approximating KL divergence").

With d = log pi_theta - log pi_ref, on tokens of pi_theta:

| estimator | value | how it acts |
|---|---|---|
| k1 | d | unbiased; its derivative is 0 on average, so it is a penalty in the *advantage*: A - coefficient sg(d) |
| k2 | d^2 / 2 | in the loss; its derivative is that of the KL divergence |
| k3 | exp(-d) - 1 + d | in the loss, as GRPO has it; unbiased, never below 0; derivative of the forward KL |

On tokens of older policies all are estimates with a bias; no importance weight is put on them. GLM-5 uses no KL term in
reasoning RL; here it is a remedy against forgetting (`retention.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from glm5.train.checks import check_choice, check_numbers


@dataclass(frozen=True, kw_only=True)
class KL:
    """How much, and which estimator."""

    coefficient: float = 1e-3
    estimator: Literal["k1", "k2", "k3"] = "k3"

    def __post_init__(self) -> None:
        check_numbers(self, "coefficient", above=0)
        check_choice(self, "estimator", "k1", "k2", "k3")


def estimate(logprobs_N: Tensor, reference_N: Tensor, estimator: str) -> Tensor:
    """The estimate of each token [N]."""
    d_N = logprobs_N - reference_N
    if estimator == "k1":
        return d_N
    return d_N.square() / 2 if estimator == "k2" else (-d_N).exp() - 1 + d_N
