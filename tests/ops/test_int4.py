"""INT4: the packed form against a loop in plain Python, and the straight-through estimator."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5.errors import InputError
from glm5.ops.quant import dequantize_int4, fake_quantize_int4, quantize_int4


def by_hand(weight: torch.Tensor, group: int) -> torch.Tensor:
    """One group after another, one value after another."""
    result = torch.empty_like(weight, dtype=torch.float32)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[row, start : start + group].float()
            scale = (values.abs().max() / 7).to(torch.bfloat16).float()
            scale = scale if scale > 0 else torch.ones(())
            result[row, start : start + group] = torch.stack([(v / scale).round().clamp(-7, 7) * scale for v in values])
    return result


@pytest.mark.parametrize(("rows", "columns", "group"), [(3, 64, 32), (2, 96, 32), (4, 40, 32), (1, 2, 32), (3, 12, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_group_has_its_scale(rows, columns, group, dtype):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight[0, :2] = 0
    quantized, scale = quantize_int4(weight, group)
    assert quantized.dtype == torch.uint8 and quantized.shape == (rows, columns // 2)
    assert scale.dtype == torch.bfloat16 and scale.shape == (rows, -(-columns // group))
    found = dequantize_int4(quantized, scale, torch.float32, group)
    assert torch.equal(found, by_hand(weight, group))
    assert torch.equal(dequantize_int4(quantized, scale, torch.bfloat16, group), found.to(torch.bfloat16))


def test_the_error_is_at_most_half_a_step():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    error = (fake_quantize_int4(weight) - weight).abs().unflatten(-1, (-1, 32))
    step = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 7
    assert (error <= step * 0.54).all() and error.max() > 0.3 * step.max()  # bf16 scales cost up to 7 / 256 more


def test_order_of_the_halves():
    """The even input is the low half; 8 is zero."""
    quantized, scale = quantize_int4(torch.tensor([[7.0, -7.0, 0.0, 1.0]]), 4)
    assert quantized.tolist() == [[15 + (1 << 4), 8 + (9 << 4)]] and scale.item() == 1.0


@given(st.integers(0, 1000))
def test_experts_are_quantised_one_by_one(seed):
    weight = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(seed))
    stacked = fake_quantize_int4(weight)
    assert torch.equal(stacked, torch.stack([fake_quantize_int4(expert) for expert in weight]))


def test_zeros_and_odd_widths():
    assert torch.equal(fake_quantize_int4(torch.zeros(2, 32)), torch.zeros(2, 32))
    with pytest.raises(InputError, match="a weight with 31 inputs cannot be INT4"):
        quantize_int4(torch.zeros(2, 31))


def test_the_gradient_goes_straight_through():
    weight = torch.randn(4, 32, requires_grad=True)
    factor = torch.randn(4, 32)
    (fake_quantize_int4(weight) * factor).sum().backward()
    assert torch.equal(weight.grad, factor)
