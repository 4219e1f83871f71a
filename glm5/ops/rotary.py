"""Rotary position embedding in both layouts.

GLM-5 rotates interleaved pairs (x0, x1), (x2, x3), ... in the main attention and in the indexer alike; DeepSeek-V3.2's
indexer rotates half-split pairs (x0, x_{R/2}), .... The wrong layout is invisible while every key is selected and
corrupts everything above `index_topk` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Tables for one layout, computed once per forward pass and shared by all layers."""

    cos_BT1R: Tensor
    sin_BT1R: Tensor
    """Negative for the first element of a pair."""
    interleaved: bool


def rotation(positions_BT: Tensor, width: int, theta: float, dtype: torch.dtype, *, interleaved: bool) -> Rotation:
    """cos and sin of `positions * theta ** (-2j / width)`; angles in fp32 as the published models were trained."""
    wide = torch.promote_types(dtype, torch.float32)
    frequencies_R = _frequencies(width, theta, wide, positions_BT.device)
    angles_BT1R = (positions_BT.to(wide)[..., None] * frequencies_R)[:, :, None]
    cos, sin = angles_BT1R.cos().to(dtype), angles_BT1R.sin().to(dtype)
    if interleaved:
        return Rotation(cos.repeat_interleave(2, -1), torch.stack((-sin, sin), dim=-1).flatten(-2), interleaved)
    return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1), interleaved)


@lru_cache(maxsize=8)
def _frequencies(width: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant of the model. An inference tensor would be of no use to a later training step."""
    with torch.inference_mode(False):
        return 1.0 / theta ** (torch.arange(0, width, 2, dtype=dtype, device=device) / width)


def rotate(x_BTHR: Tensor, rotation: Rotation) -> Tensor:
    """Rotates each pair of the last dimension, (a, b) -> (a cos - b sin, b cos + a sin); the layout stays."""
    if rotation.interleaved:
        swapped_BTHR = x_BTHR.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped_BTHR = x_BTHR.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x_BTHR * rotation.cos_BT1R, swapped_BTHR, rotation.sin_BT1R)
