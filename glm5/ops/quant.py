"""The one quantiser: FP8 e4m3 with one fp32 scale per 128 x 128 block (the format of the GLM-5 FP8 releases), and INT4.

    FP8   scale[i, j] = max |W| over block (i, j) / 448    q = e4m3(W / scale)              W' = q * scale
    INT4  scale[i, g] = bf16(max |W| of group g / 7)       q = round(W / scale) in -7..7    W' = q * scale

A group of INT4 is `group` inputs of one output row. Two values share a byte, the even input in the low half, each
stored as q + 8; scales are bf16, so that a weight takes 4.5 bits with groups of 32.

Training (QAT), conversion and the engine all call these functions, so that a weight has one quantised form. A further
format is a further pair of functions here, with the same shape: `quantize_x(weight) -> (stored, scale)` and
`dequantize_x(stored, scale, dtype)`. Left out on purpose: activation scales (they belong to the kernel that needs them)
and any rounding other than to nearest even.

Two dequantisers stand side by side. `dequantize_fp8_reference` is the definition. `dequantize_fp8` gives the same
bits several times faster on a CPU, where the cast from e4m3 is scalar code: it moves the bits of e4m3 into an fp32 word
and lets the multiplication by the scale repair the exponent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5.errors import InputError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_BLOCK = (128, 128)

# An e4m3 byte s.eeee.mmm shifted left by 20 lies on the sign (by sign extension), exponent and mantissa bits of fp32.
# Its exponent bias is then 127 where e4m3 has 7, so the word reads 2^-120 times too small, subnormals included.
_FP32_BITS_OF_E4M3 = 0x87F0_0000 - 2**32  # as a signed 32-bit number
_BIAS_REPAIR = 2.0**120
_LARGEST_FOLDED_SCALE = 2.0**7  # beyond it, scale * 2^120 leaves fp32


def fp8_scale_shape(shape: torch.Size | tuple[int, ...], block: tuple[int, int] = FP8_BLOCK) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., rows, columns]: [..., ceil(rows / block), ceil(columns / block)]."""
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


def expand_block_scale(
    scale: Tensor, shape: torch.Size | tuple[int, ...], block: tuple[int, int] = FP8_BLOCK
) -> Tensor:
    """One scale per block -> one per element of a weight of `shape` [..., rows, columns]."""
    rows, columns = shape[-2:]
    return scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]


def fp8_block_scales(weight: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """fp32 scales of `weight` [..., rows, columns]; a block of zeros gets 1, so that no scale is ever 0."""
    *lead, rows, columns = weight.shape
    scale = torch.empty(fp8_scale_shape(weight.shape, block), dtype=torch.float32, device=weight.device)
    for i, start in enumerate(range(0, rows, block[0])):  # a row of blocks at a time: it stays in cache
        column_max = weight.detach()[..., start : start + block[0], :].abs().amax(-2)
        whole_blocks = F.pad(column_max, (0, -columns % block[1]))
        scale[..., i, :] = whole_blocks.view(*lead, -1, block[1]).amax(-1)
    scale /= FP8_MAX
    return torch.where(scale == 0, 1.0, scale)


def quantize_fp8(weight: Tensor, block: tuple[int, int] = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """`weight` [..., rows, columns] in any float dtype -> (e4m3 of the same shape, fp32 scales per block).

    The division may round past 448 by one unit in the last place, and e4m3 has no infinity to hold it: hence the clamp.
    No gradient passes; quantisation-aware training puts its straight-through estimator around this.
    """
    scale = fp8_block_scales(weight, block)
    column_scale = scale.repeat_interleave(block[1], -1)[..., : weight.shape[-1]]
    quantized = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    for i, start in enumerate(range(0, weight.shape[-2], block[0])):
        rows = weight.detach()[..., start : start + block[0], :]
        quantized[..., start : start + block[0], :] = (rows.float() / column_scale[..., i : i + 1, :]).clamp_(
            -FP8_MAX, FP8_MAX
        )
    return quantized, scale


def dequantize_fp8_reference(
    quantized: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] = FP8_BLOCK
) -> Tensor:
    """The definition: multiply in fp32, round once to `dtype`."""
    return (quantized.float() * expand_block_scale(scale.float(), quantized.shape, block)).to(dtype)


def dequantize_fp8(quantized: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """Equal to `dequantize_fp8_reference` to the bit; chooses the fast form where it is faster and exact.

    The fast form needs scales below 128 (all real ones are far below 1), reads subnormal numbers (so not under
    `torch.set_flush_denormal(True)`) and must see no NaN code, which it would read as 480.
    """
    exact = quantized.device.type == "cpu" and quantized.ndim == 2 and bool((scale < _LARGEST_FOLDED_SCALE).all())
    if exact:
        result = _dequantize_by_bits(quantized, scale.float(), dtype, block)
        if result is not None:
            return result
    return dequantize_fp8_reference(quantized, scale, dtype, block)


def _dequantize_by_bits(quantized: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Tensor | None:
    """The bit form for one matrix, a row of blocks at a time (it stays in cache); None when it meets a NaN code."""
    result = torch.empty(quantized.shape, dtype=dtype)
    codes = quantized.view(torch.int8)
    column_scale = (scale * _BIAS_REPAIR).repeat_interleave(block[1], -1)[:, : quantized.shape[1]]
    largest = FP8_MAX / _BIAS_REPAIR
    for i, start in enumerate(range(0, quantized.shape[0], block[0])):
        words = codes[start : start + block[0]].to(torch.int32).bitwise_left_shift_(20).bitwise_and_(_FP32_BITS_OF_E4M3)
        values = words.view(torch.float32)
        low, high = torch.aminmax(values)
        if low < -largest or high > largest:
            return None
        result[start : start + block[0]] = values.mul_(column_scale[i])
    return result


INT4_GROUP = 32
"""Inputs that share a scale; every width of the published models and of `nano` is a multiple of it."""


def int4_shapes(shape: tuple[int, ...], group: int = INT4_GROUP) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what `quantize_int4` makes of a weight [..., out, in]."""
    *lead, columns = shape
    return (*lead, columns // 2), (*lead, -(-columns // group))


def quantize_int4(weight: Tensor, group: int = INT4_GROUP) -> tuple[Tensor, Tensor]:
    """`weight` [..., out, in] -> (uint8 [..., out, in / 2], bf16 scales [..., out, ceil(in / group)]).

    A last group may be shorter. Raises InputError when `in` is odd. Computed in fp32 whatever the dtype, so that a bf16
    weight and the same values in fp32 have one quantised form. No gradient passes; see `fake_quantize_int4`.
    """
    columns = weight.shape[-1]
    if columns % 2:
        raise InputError(f"a weight with {columns} inputs cannot be INT4: two of them share a byte; keep it in bf16.")
    wide = F.pad(weight.detach().float(), (0, -columns % group)).unflatten(-1, (-1, group))
    scale = (wide.abs().amax(-1) / 7).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (wide / scale.float()[..., None]).round_().clamp_(-7, 7).add_(8).to(torch.uint8)
    codes = codes.flatten(-2)[..., :columns]
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale


def dequantize_int4(quantized: Tensor, scale: Tensor, dtype: torch.dtype, group: int = INT4_GROUP) -> Tensor:
    """The weight [..., out, in] of `quantize_int4`: a product in fp32, rounded once to `dtype`."""
    codes = torch.stack((quantized & 15, quantized >> 4), dim=-1).flatten(-2)
    by_column = scale.float().repeat_interleave(group, -1)[..., : codes.shape[-1]]
    return ((codes.float() - 8) * by_column).to(dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, weight: Tensor, group: int) -> Tensor:
        quantized, scale = quantize_int4(weight, group)
        return dequantize_int4(quantized, scale, weight.dtype, group)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def fake_quantize_int4(weight: Tensor, group: int = INT4_GROUP) -> Tensor:
    """What a served INT4 weight will be, to the bit; its gradient goes to `weight` as if nothing had been rounded.

    The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432), as a function of its own: the usual form
    `weight + (rounded - weight).detach()` adds two roundings that nothing promises to be exact.
    """
    result: Tensor = _StraightThrough.apply(weight, group)
    return result
