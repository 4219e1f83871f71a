"""What changed between two versions, as few bytes: exclusive or, bytes of equal rank side by side, zstd.

After a small step most of a float's upper bytes are what they were, so their exclusive or is zero; with the first bytes
of all values beside each other, then all second bytes and so on, the zeros stand in long runs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from glm5.errors import InputError, WeightsError

STRIDE = 4
"""Bytes of a value: right for fp32, and bf16 pairs fall into two classes of upper bytes."""
LEVEL = 1


def encode(new: Tensor, base: Tensor) -> bytes:
    """The delta that turns `base` into `new`; both uint8, of equal size, a multiple of `STRIDE`."""
    planes = (new ^ base).view(-1, STRIDE).t().contiguous()
    return _zstandard().ZstdCompressor(level=LEVEL).compress(planes.numpy().data)


def apply(delta: bytes, base: Tensor) -> Tensor:
    """What `encode` was given as `new`. Raises `WeightsError` for a delta that cannot be read."""
    try:
        raw = _zstandard().ZstdDecompressor().decompress(delta, max_output_size=len(base))
    except _zstandard().ZstdError as error:
        raise WeightsError(f"A delta of weights cannot be read ({error}); publish a whole version.") from None
    if len(raw) != len(base):
        raise WeightsError(f"A delta is for {len(raw)} bytes, the weights have {len(base)}; publish a whole version.")
    planes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(STRIDE, -1)
    return planes.t().reshape(-1) ^ base


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError:
        raise InputError("Deltas of weights need the package zstandard; install glm5[cluster].") from None
    return zstandard
