"""The output head over the tokens that are learnt from: their log-probabilities, in memory that knows a bound.

A vocabulary of 154,880 makes 620 kB of float32 logits a position, and the loss holds several tensors of their size. So
where the logits of a whole pass are more than `Passes.logits`, the model leaves its head to this file
(`collect={"states"}`): it is applied to the sampled tokens alone, a piece of them at a time, and once more in the
backward pass instead of keeping what that needs (Chen et al. 2016, arXiv 1604.06174). A pass with fewer is computed as
the plain update does it (`plain/update.py`), to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glm5.engine.sampler import tempered
from glm5.model import GLM5, ModelOutput
from glm5.rl.packing import Passes, Places, Rows


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says of N tokens, float32."""

    logprobs_N: Tensor
    entropies_N: Tensor
    """Of the distributions that they were drawn from, in nats; zeros unless they were asked for."""


def without_head(model: GLM5, rows: Rows, passes: Passes, collect: frozenset[str]) -> frozenset[str]:
    """The names to collect: also "states" where the logits of all positions are more than are held at once."""
    heads = 1 + (model.mtp_steps if "mtp" in collect else 0)
    many = rows.ids_BT.numel() * model.config.vocab_size * heads > passes.logits
    return collect | {"states"} if many else collect


def said_of(
    model: GLM5, output: ModelOutput, at: Places, passes: Passes, *, ahead: int = 0, entropy: bool = False
) -> Said:  # fmt: skip
    """What the trunk (ahead = 0) or draft step `ahead - 1` says of the tokens at these places; differentiable."""
    if not output.states:
        logits_BTV = (output.logits, *output.mtp_logits)[ahead]
        return Said(*_judged(logits_BTV[at.rows_N, at.columns_N], at.targets_N, passes.temperature, entropy))

    def piece(state_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        return _judged(model.lm_head(state_ND), targets_N, passes.temperature, entropy)

    size = max(passes.logits // model.config.vocab_size, 1)
    pieces = [
        checkpoint(piece, state_ND, targets_N, use_reentrant=False, preserve_rng_state=False)
        for state_ND, targets_N in zip(
            output.states[ahead][at.rows_N, at.columns_N].split(size), at.targets_N.split(size), strict=True
        )
    ]  # fmt: skip
    logprobs, entropies = zip(*pieces, strict=True)
    return Said(torch.cat(logprobs), torch.cat(entropies))


def _judged(logits_NV: Tensor, targets_N: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of the targets, and entropies [N]."""
    log_softmax_NV = tempered(logits_NV.float(), temperature).log_softmax(-1)
    logprobs_N = log_softmax_NV.gather(-1, targets_N[:, None])[:, 0]
    if not entropy:
        return logprobs_N, torch.zeros_like(logprobs_N)
    return logprobs_N, -(log_softmax_NV.exp() * log_softmax_NV).sum(-1)
