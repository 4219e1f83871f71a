"""From the logits of one position to one token, with a random number of (seed, sample, position) and nothing else.

The generator is Philox-4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a keyed counter:
the key is the request's seed and the sample's number, the counter is the position. So a token depends neither on
what else is in the batch nor on what was sampled before it, and a sequence that is interrupted and resumed goes on
identically.

One uniform number inverts the cumulative distribution in vocabulary order. Everything after the logits runs on the
CPU, one row at a time: the filters in double precision, some tens of microseconds at 4096 tokens, and the same bits for
every batch. (Rows together were measured and are no faster: the time is that of the exponentials, not of the calls.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glm5.engine.outputs import TopLogprobs
from glm5.engine.sampling_params import SamplingParams
from glm5.errors import InputError

Doubles = npt.NDArray[np.float64]
NO_TOKEN = "The settings of this request leave no token to sample; forbid fewer, or penalise less."
HEAD = 256
"""Likeliest tokens that `top_p` sorts first; only where their sum stays below it is the rest sorted too."""


class SampledToken(NamedTuple):
    """A token and its log-probability under the model itself (temperature 1, nothing cut off or masked)."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs


def uniforms(seed: int, sample: int, start: int, count: int) -> list[float]:
    """The random numbers in [0, 1) of positions `start` to `start + count - 1` of one sample of a request."""
    generator = np.random.Philox(key=np.array([seed, sample], dtype=np.uint64), counter=start)
    # A counter gives four words, of which a position uses the first: 53 bits of it, as NumPy makes a double.
    words: list[int] = (generator.random_raw(4 * count)[::4] >> np.uint64(11)).tolist()
    return [word * 2.0**-53 for word in words]


def uniform(seed: int, sample: int, position: int) -> float:
    """The random number in [0, 1) of one position of one sample of a request."""
    return uniforms(seed, sample, position, 1)[0]


def filtered_probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that is sampled: temperature, then `min_p`, `top_k`, `top_p`. Float64 [V], sums to 1.

    Needs a temperature above 0. A cut between equally likely tokens keeps the lower ids.
    """
    weights_V = torch.from_numpy(filtered_weights(logits_V, params))
    return weights_V / weights_V.sum()


def filtered_weights(logits_V: Tensor, params: SamplingParams) -> Doubles:
    """`filtered_probabilities` without the division by their sum; the likeliest token weighs 1."""
    # The largest logit is taken off first, so that a tiny temperature cannot overflow.
    logits_V = logits_V.detach().double()
    weights_V: Doubles = (logits_V - logits_V.max()).div_(params.temperature).exp_().numpy()
    if params.min_p > 0.0:
        weights_V[weights_V < params.min_p] = 0.0
    if 0 < params.top_k < len(weights_V):
        weights_V = _largest(weights_V, params.top_k)
    if params.top_p < 1.0:
        weights_V = _nucleus(weights_V, params.top_p)
    return weights_V


def _largest(weights_V: Doubles, count: int) -> Doubles:
    """The `count` largest weights, the rest zero."""
    smallest = np.partition(weights_V, len(weights_V) - count)[len(weights_V) - count]
    kept_V = weights_V > smallest
    equal = np.flatnonzero(weights_V == smallest)
    kept_V[equal[: count - int(kept_V.sum())]] = True
    return np.where(kept_V, weights_V, 0.0)


def _nucleus(weights_V: Doubles, top_p: float) -> Doubles:
    """The largest weights while those ahead of each sum to less than `top_p` of all, the rest zero."""
    enough, vocab = top_p * weights_V.sum(), len(weights_V)
    candidates = np.arange(vocab)
    if vocab > HEAD:
        # All that are at least as large as the HEAD-th: a beginning of the sorted order, so the result is the same.
        head = np.flatnonzero(weights_V >= np.partition(weights_V, vocab - HEAD)[vocab - HEAD])
        if weights_V[head].sum() > enough:
            candidates = head
    order = candidates[np.argsort(-weights_V[candidates], kind="stable")]
    sorted_K = weights_V[order]
    before_K = sorted_K.cumsum() - sorted_K
    kept = order[before_K < enough]
    nucleus_V = np.zeros_like(weights_V)
    nucleus_V[kept] = weights_V[kept]
    return nucleus_V


def sample_token(logits_V: Tensor, params: SamplingParams, random: float) -> int:
    """One token id from logits [V] on the CPU and a uniform number in [0, 1).

    Raises InputError where the request's settings leave no token, or none whose logit is a number.
    """
    if params.temperature == 0.0:
        values_V = logits_V.detach().numpy()
        likeliest = int(values_V.argmax())  # the first of equals
        if not math.isfinite(values_V[likeliest]):  # all are -inf, or one is NaN
            raise InputError(NO_TOKEN)
        return likeliest
    cumulative_V = filtered_weights(logits_V, params).cumsum()
    if not 0.0 < cumulative_V[-1] < math.inf:
        raise InputError(NO_TOKEN)
    # Scaling by the last sum keeps rounding from ever passing the last token; "right" skips tokens of probability 0.
    token_id = int(cumulative_V.searchsorted(random * cumulative_V[-1], side="right"))
    return min(token_id, len(cumulative_V) - 1)


def token_logprobs(
    logits_V: Tensor, token_id: int, top: int | None, temperature: float = 1.0
) -> tuple[float, TopLogprobs]:
    """The token's log-probability under the model itself (temperature 1, nothing cut off), and the `top` likeliest.

    Computed in float32, as the trainer computes its own, so that the two can be compared. temperature: of a policy that
    samples at another one.
    """
    logprobs_V = tempered(logits_V.detach().float(), temperature).log_softmax(-1)
    likeliest: TopLogprobs = ()
    if top:
        values_K, ids_K = logprobs_V.topk(min(top, len(logprobs_V)))
        likeliest = tuple(zip(ids_K.tolist(), values_K.tolist(), strict=True))
    return float(logprobs_V.numpy()[token_id]), likeliest


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the same shape at a temperature; at 1 the very same."""
    return logits if temperature == 1.0 else logits / temperature


def prompt_logprobs(logits_TV: Tensor, next_ids: list[int], top: int) -> list[SampledToken]:
    """Log-probabilities of given tokens: row t of the logits [T, V] is the prediction of `next_ids[t]`.

    Row by row, so that beside the logits one row more is held; the first token of a prompt has none.
    """
    return [SampledToken(i, *token_logprobs(logits_TV[t], i, top)) for t, i in enumerate(next_ids)]
