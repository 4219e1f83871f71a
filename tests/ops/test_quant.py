"""FP8 blocks against plain loops and Python arithmetic; the fast dequantiser against the definition, to the bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.ops.quant import (
    FP8,
    FP8_MAX,
    dequantize_fp8,
    dequantize_fp8_reference,
    fp8_block_scales,
    fp8_scale_shape,
    quantize_fp8,
)

ALL_CODES = torch.arange(256, dtype=torch.uint8).view(FP8)
NAN_CODES = (0x7F, 0xFF)


def e4m3_value(code: int) -> float:
    """An e4m3 byte by its definition: sign, four exponent bits with bias 7, three mantissa bits."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_finite_code_is_exact_in_both_forms(dtype: torch.dtype) -> None:
    codes = [code for code in range(256) if code not in NAN_CODES]
    quantized = ALL_CODES[codes].reshape(1, -1)
    expected = torch.tensor([[e4m3_value(code) for code in codes]], dtype=dtype)
    scale = torch.ones(fp8_scale_shape(quantized.shape))
    assert same_bits(dequantize_fp8_reference(quantized, scale, dtype), expected)
    assert same_bits(dequantize_fp8(quantized, scale, dtype), expected)


@pytest.mark.parametrize("code", NAN_CODES)
@pytest.mark.parametrize("row", [0, 199])
def test_a_nan_code_stays_nan(code: int, row: int) -> None:
    codes = torch.zeros(200, 3, dtype=torch.uint8)
    codes[row, 1] = code
    result = dequantize_fp8(codes.view(FP8), torch.ones(2, 1), torch.bfloat16)
    assert result[row, 1].isnan() and result.isnan().sum() == 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    exponent=st.integers(-140, 10),
    seed=st.integers(0, 2**31),
)
def test_fast_form_equals_definition_to_the_bit(
    rows: int, columns: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    """Random finite codes; scales from subnormal to above 128, where the fast form has to step aside."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, (rows, columns), generator=generator, dtype=torch.uint8)
    quantized = torch.where(codes >= 127, codes + 1, codes).view(FP8)  # 0..126 and 128..254: every code but the NaNs
    scale = torch.rand(fp8_scale_shape(quantized.shape), generator=generator) * 2.0**exponent
    expected = dequantize_fp8_reference(quantized, scale, dtype)
    assert same_bits(dequantize_fp8(quantized, scale, dtype), expected)


@pytest.mark.parametrize(("shape", "block"), [((130, 257), (128, 128)), ((5, 7), (2, 3)), ((2, 129, 40), (128, 128))])
def test_quantise_equals_a_plain_loop(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    quantized, scale = quantize_fp8(weight, block)
    assert scale.shape == fp8_scale_shape(shape, block) and quantized.shape == weight.shape
    matrices = zip(*(t.reshape(-1, *t.shape[-2:]) for t in (weight, quantized.float(), scale)), strict=True)
    for w, q, s in matrices:
        for i in range(s.shape[0]):
            for j in range(s.shape[1]):
                area = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                assert s[i, j] == w[area].abs().max() / FP8_MAX
                assert torch.equal(q[area], (w[area] / s[i, j]).clamp(-FP8_MAX, FP8_MAX).to(FP8).float())
                assert q[area].abs().max() == FP8_MAX


def test_round_trip_error_is_half_a_unit_of_three_mantissa_bits() -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    quantized, scale = quantize_fp8(weight)
    error = (dequantize_fp8(quantized, scale, torch.float32) - weight).abs()
    floor = 2.0**-10 * scale.max()  # half of the smallest e4m3 step
    assert (error <= torch.maximum(weight.abs() * 2.0**-4 * 1.0001, floor)).all()


def test_a_block_of_zeros_and_tiny_weights_stay_finite() -> None:
    weight = torch.zeros(256, 128)
    weight[128:] = 1e-30
    quantized, scale = quantize_fp8(weight)
    assert scale[0, 0] == 1.0
    restored = dequantize_fp8(quantized, scale, torch.float32)
    assert torch.equal(restored[:128], weight[:128]) and torch.allclose(restored[128:], weight[128:], rtol=1e-6)


def test_bf16_weights_are_scaled_by_their_exact_maximum() -> None:
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert fp8_block_scales(weight).item() == (weight.float().abs().max() / FP8_MAX).item()
