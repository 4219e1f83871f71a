"""Rotary position embedding in both layouts.

GLM-5 rotates interleaved pairs (x0, x1), (x2, x3), ... in the main attention and in the indexer alike; DeepSeek-V3.2's
indexer rotates half-split pairs (x0, x_{R/2}), .... The wrong layout is invisible while every key is selected and
corrupts everything above `index_topk` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each [B, T, 1, R/2]; computed once per forward and shared by all layers."""


def rotation(positions_BT: Tensor, width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """cos and sin of `positions * theta ** (-2j / width)`; angles in fp32 as the published models were trained."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, width, 2, dtype=wide, device=positions_BT.device) / width
    angles_BT1R = (positions_BT.to(wide)[..., None] * (1.0 / theta**exponents))[:, :, None]
    return angles_BT1R.cos().to(dtype), angles_BT1R.sin().to(dtype)


def rotate(x_BTHR: Tensor, rotation: Rotation, *, interleaved: bool) -> Tensor:
    """Rotates the last dimension of x; the layout of the output equals that of the input."""
    cos, sin = rotation
    if interleaved:
        a, b = x_BTHR.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x_BTHR.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
