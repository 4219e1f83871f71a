"""What a model says of the tokens that are learnt from: their log-probabilities, in memory that knows a bound.

Only the sampled tokens' logits are made, at most `Passes.logits` of them at a time (`glm5.model.head`): what stands in
a prompt, in a tool's answer or in padding is not asked for. The plain update (`plain/update.py`) has the same, to the
bit, wherever one piece is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm5.engine.sampler import tempered
from glm5.model import GLM5, ModelOutput, by_pieces
from glm5.rl.packing import Passes, Places


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says of N tokens, float32."""

    logprobs_N: Tensor
    entropies_N: Tensor
    """Of the distributions that they were drawn from, in nats; zeros unless they were asked for."""


def said_of(
    model: GLM5, output: ModelOutput, at: Places, passes: Passes, *, ahead: int = 0, entropy: bool = False
) -> Said:  # fmt: skip
    """What the trunk (ahead = 0) or draft step `ahead - 1` says of the tokens at these places; differentiable.

    output: of a pass that collected "states".
    """

    def judged(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        return _judged(logits_NV, targets_N, passes.temperature, entropy)

    states_ND = output.states[ahead][at.rows_N, at.columns_N]
    heads = len(output.states)
    pieces = by_pieces(model, states_ND, at.targets_N, judged, passes.logits, heads=heads)
    logprobs, entropies = zip(*pieces, strict=True)
    return Said(torch.cat(logprobs), torch.cat(entropies))


def _judged(logits_NV: Tensor, targets_N: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of the targets, and entropies [N]."""
    log_softmax_NV = tempered(logits_NV.float(), temperature).log_softmax(-1)
    logprobs_N = log_softmax_NV.gather(-1, targets_N[:, None])[:, 0]
    if not entropy:
        return logprobs_N, torch.zeros_like(logprobs_N)
    return logprobs_N, -(log_softmax_NV.exp() * log_softmax_NV).sum(-1)
