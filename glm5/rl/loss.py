"""The one interface of policy losses: flat tokens in, a weighted sum and its diagnostics out.

Tokens of all samples lie side by side [N], so that packing and micro-batches cannot change a loss: each token
brings its weight along, and the weights of a whole update add up to 1 (of "fixed-length" in `packing.py`, to the mean
share of that length). A loss is a callable of `PolicyTokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Normalisation = Literal["sequence-mean", "token-mean"]
"""`sequence-mean`: every sample weighs the same (GLM-5 report, eq. 1). `token-mean`: every token does."""


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """Sampled tokens [N] with all that a loss may need. Only `logprobs_N` carries a gradient."""

    logprobs_N: Tensor
    """Under the weights being trained."""
    old_logprobs_N: Tensor
    """Under the trainer's weights before this step's first update."""
    sampled_logprobs_N: Tensor
    """As the engine reported them when it sampled."""
    advantages_N: Tensor
    weights_N: Tensor
    sequences_N: Tensor
    """int64: which sequence of this micro-batch, from 0 and ascending; all tokens of a sequence are in one."""
    ages_N: Tensor
    """int64: versions between the weights that sampled a token and the trainer's before this step; 0 is on-policy."""

    @property
    def num_sequences(self) -> int:
        """Of this micro-batch."""
        return int(self.sequences_N[-1]) + 1 if len(self.sequences_N) else 0


@dataclass(frozen=True, slots=True)
class PolicyLossResult:
    """`total` is to be differentiated; `diagnostics` are detached sums over tokens, weighted. A learner makes means of
    them."""

    total: Tensor
    diagnostics: dict[str, Tensor]


class PolicyLoss(Protocol):
    """A policy-gradient loss."""

    def __call__(self, tokens: PolicyTokens) -> PolicyLossResult:
        """The weighted sum over the tokens, to be minimised."""


def sequence_means(values_N: Tensor, tokens: PolicyTokens) -> Tensor:
    """For every token the mean over its sequence [N]; differentiable."""
    count_S = torch.bincount(tokens.sequences_N, minlength=tokens.num_sequences)
    sum_S = values_N.new_zeros(tokens.num_sequences).index_add(0, tokens.sequences_N, values_N)
    return (sum_S / count_S)[tokens.sequences_N]


def token_weights(lengths: Sequence[int], normalisation: Normalisation) -> list[float]:
    """The weight of each sample's tokens, so that all tokens of the step together weigh 1."""
    if normalisation == "sequence-mean":
        return [1.0 / (len(lengths) * length) for length in lengths]
    return [1.0 / sum(lengths)] * len(lengths)


def gathered_logprobs(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Log-probability [B, T] in float32 of the token that follows each position."""
    return logits_BTV.float().log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]


def weighted(values_N: Tensor, tokens: PolicyTokens) -> Tensor:
    """A diagnostic: the weighted sum of a detached value."""
    return torch.sum(values_N.detach() * tokens.weights_N)
