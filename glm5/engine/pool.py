"""The rows of one layer's cache in one of three storage formats: fp32, bf16, or fp8 with a scale per group.

fp8 is e4m3 (4 bits of exponent, 3 of mantissa) with one power of two per group of at most 64 columns, kept as a byte
(e8m0, as in OCP's MX formats; 255 means that the group held NaN or infinity, and reads as NaN). A power of two costs
no precision: every value comes back within 2^-4 of itself, or, where it is small beside the largest m of its group,
within 2^-17 m. Reading goes by the bits: shifted into an fp32, the byte is the value times 2^-120.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5.errors import InputError, did_you_mean

Storage = Literal["fp32", "bf16", "fp8"]
GROUP = 64
"""Columns that share a scale."""
LARGEST = 448.0
"""Of e4m3."""
BIAS = 127
"""Of the exponents in scale bytes."""
LARGE = 1 << 22
"""Bytes from which on rows lie in huge pages: two of them."""


def check_storage(storage: str) -> None:
    """One of the three formats."""
    known = get_args(Storage)
    if storage not in known:
        raise InputError(f"storage is {storage!r}; use {', '.join(known)}.{did_you_mean(storage, known)}")


class Pool:
    """`slots` rows of `width` values. Written and read in any floating dtype; the bytes are the format's."""

    def __init__(self, slots: int, width: int, storage: Storage, device: torch.device) -> None:
        self.storage, self.width = storage, width
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}[storage]
        self.rows_XW = _empty(slots, width, dtype, device)
        self.scales_XG: Tensor | None = None
        if storage == "fp8":
            self.scales_XG = torch.empty(slots, -(-width // GROUP), dtype=torch.uint8, device=device)

    @property
    def bytes_per_row(self) -> int:
        """Scales included."""
        groups = 0 if self.scales_XG is None else self.scales_XG.shape[1]
        return self.width * self.rows_XW.element_size() + groups

    def write(self, slots_N: Tensor, rows_NW: Tensor) -> None:
        """Stores rows at slots (int64), rounded to the format."""
        if self.scales_XG is None:
            self.rows_XW[slots_N] = rows_NW.to(self.rows_XW.dtype)
        else:
            self.rows_XW[slots_N], self.scales_XG[slots_N] = to_fp8(rows_NW)

    def read(self, slots_N: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of the rows at slots (int64), in the dtype asked for."""
        rows_NW = self.rows_XW.index_select(0, slots_N)
        if self.scales_XG is None:
            return rows_NW.to(dtype)
        return from_fp8(rows_NW, self.scales_XG.index_select(0, slots_N)).to(dtype)

    def copy(self, pairs: Sequence[tuple[int, int]], size: int) -> None:
        """Copies blocks of `size` slots: (from, to) in numbers of blocks, all read before any is written."""
        from_P, to_P = torch.tensor(pairs, device=self.rows_XW.device).T
        for rows in (self.rows_XW, self.scales_XG):
            if rows is not None:
                blocks = rows.view(-1, size, rows.shape[1])
                blocks[to_P] = blocks[from_P]


def _empty(slots: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows that the system gives the memory of when they are first written, in huge pages where it knows them: a step
    reads rows from everywhere, and every new page of 4 KB costs a walk through the page tables."""
    size = slots * width * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size < LARGE:
        return torch.empty(slots, width, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the tensor keeps it
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(slots, width)


def to_fp8(rows_NW: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [N, W] of e4m3 and scale bytes [N, groups]: the least power of two that brings a group to 448 or less."""
    rows_NW = rows_NW.float()
    groups = -(-rows_NW.shape[1] // GROUP)
    padded_NGW = F.pad(rows_NW, (0, groups * GROUP - rows_NW.shape[1])).unflatten(1, (groups, GROUP))
    largest_NG = padded_NGW.abs().amax(-1)
    mantissa_NG, exponent_NG = torch.frexp(largest_NG / LARGEST)
    exponent_NG = (exponent_NG - (mantissa_NG == 0.5).to(torch.int32)).clamp_min(1 - BIAS)
    scaled_NGW = (padded_NGW * _power(-exponent_NG)[..., None]).clamp_(-LARGEST, LARGEST)
    bytes_NW = scaled_NGW.to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)[:, : rows_NW.shape[1]]
    scales_NG = (exponent_NG + BIAS).masked_fill_(~largest_NG.isfinite(), 255)
    return bytes_NW, scales_NG.to(torch.uint8)


def from_fp8(bytes_NW: Tensor, scales_NG: Tensor) -> Tensor:
    """The fp32 values that `to_fp8` kept."""
    bits_NW = bytes_NW.view(torch.int8).to(torch.int32).bitwise_left_shift_(20).bitwise_and_(-0x78100000)
    values_NW = bits_NW.view(torch.float32).mul_(2.0**120)
    scale_NG = _power(scales_NG.to(torch.int32) - BIAS).masked_fill_(scales_NG == 255, float("nan"))
    return values_NW.mul_(scale_NG.repeat_interleave(GROUP, dim=1)[:, : bytes_NW.shape[1]])


def _power(exponent: Tensor) -> Tensor:
    """2 to the exponents (int32), exactly."""
    return (exponent + BIAS).bitwise_left_shift_(23).view(torch.float32)
