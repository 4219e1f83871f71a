"""From the logits of one position to one token, with a random number of (seed, sample, position) and nothing else.

The generator is Philox-4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a keyed counter:
the key is the request's seed and the sample's number, the counter is the position. So a token depends neither on
what else is in the batch nor on what was sampled before it, and a sequence that is interrupted and resumed goes on
identically.

One uniform number inverts the cumulative distribution in vocabulary order. Everything after the logits runs in
double precision on the CPU, one row at a time: a few microseconds, and the same bits for every batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from glm5.engine.sampling_params import SamplingParams


def uniform(seed: int, sample: int, position: int) -> float:
    """The random number in [0, 1) of one position of one sample of a request."""
    key = np.array([seed, sample], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=position)).random())


def filtered_probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that is sampled: temperature, then `min_p`, `top_k`, `top_p`. Float64 [V], sums to 1.

    Needs a temperature above 0. A cut between equally likely tokens keeps the lower ids.
    """
    # The largest logit is taken off first, so that a tiny temperature cannot overflow.
    logits_V = logits_V.double()
    probabilities_V = ((logits_V - logits_V.max()) / params.temperature).softmax(-1)
    if params.min_p > 0.0:
        probabilities_V = probabilities_V.where(probabilities_V >= params.min_p * probabilities_V.max(), 0.0)
    if 0 < params.top_k < len(probabilities_V) or params.top_p < 1.0:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        if params.top_k > 0:
            sorted_V[params.top_k :] = 0.0
        if params.top_p < 1.0:
            sorted_V = sorted_V / sorted_V.sum()
            before_V = sorted_V.cumsum(-1) - sorted_V  # a token stays while those ahead of it have not reached top_p
            sorted_V = sorted_V.where(before_V < params.top_p, 0.0)
        probabilities_V = torch.zeros_like(probabilities_V).scatter_(0, order_V, sorted_V)
    return probabilities_V / probabilities_V.sum()


def sample_token(logits_V: Tensor, params: SamplingParams, random: float) -> int:
    """One token id from logits [V] and a uniform number in [0, 1)."""
    if params.temperature == 0.0:
        return int(logits_V.argmax())
    cumulative_V = filtered_probabilities(logits_V, params).cumsum(-1)
    # Scaling by the last sum keeps rounding from ever passing the last token; `right` skips tokens of probability 0.
    target = torch.tensor(random, dtype=torch.float64) * cumulative_V[-1]
    return min(int(torch.searchsorted(cumulative_V, target, right=True)), len(logits_V) - 1)


def token_logprobs(logits_V: Tensor, token_id: int, top: int | None) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The token's log-probability under the model itself (temperature 1, nothing cut off), and the `top` likeliest.

    Computed in float32, as the trainer computes its own, so that the two can be compared.
    """
    logprobs_V = logits_V.float().log_softmax(-1)
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        values_K, ids_K = logprobs_V.topk(min(top, len(logprobs_V)))
        likeliest = tuple(zip(ids_K.tolist(), values_K.tolist(), strict=True))
    return float(logprobs_V[token_id]), likeliest
