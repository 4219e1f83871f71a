"""Initial weights, in one place: normal with `initializer_range` (0.02), norms at one, biases at zero.

The GLM-5 report gives no other rule than the published `initializer_range`; adapters start as a zero change.
"""

from __future__ import annotations

import torch
from torch import nn

from glm5.ops.linear import LowRank
from glm5.ops.norm import RMSNorm


@torch.no_grad()
def initialize_(model: nn.Module, std: float, seed: int | None = None) -> None:
    """Fills every weight of `model`; the same seed gives the same weights on every machine of one dtype."""
    generator = None if seed is None else torch.Generator(device="cpu").manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LowRank):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm | nn.LayerNorm):
                parameter.fill_(0.0 if name == "bias" else 1.0)
            elif parameter.device.type == "cpu":
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "e_score_correction_bias":
                buffer.zero_()
