"""Each function of the decode extension against PyTorch's operators or `reference.py`, in every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glm5.ops import decoding, reference
from glm5.ops.decoding import Matrix, Stored
from glm5.ops.rotary import rotate, rotation

if not decoding.available():
    pytest.skip("the install found no C compiler", allow_module_level=True)

from glm5.ops import _decoding


@pytest.fixture(params=range(_decoding.variants()), autouse=True)
def variant(request: pytest.FixtureRequest) -> Iterator[None]:
    _decoding.use_variant(request.param)
    yield
    _decoding.use_variant(0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


WIDTHS = [1, 3, 8, 20, 33, 128]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("outputs", [1, 8, 21])
def test_linear_sets_scales_and_adds(width, outputs):
    x, weight, y = random(3, width), random(outputs, width, seed=1), random(3, outputs, seed=2)
    for scale, add in ((1.0, False), (0.5, False), (-2.0, True)):
        expected = (y if add else 0) + scale * F.linear(x, weight)
        decoding.linear(Matrix.of(y), Matrix.of(x), Matrix.of(weight), scale, add)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours():
    x, weight = random(5, 77), random(19, 77)
    together, alone = torch.empty(5, 19), torch.empty(5, 19)
    decoding.linear(Matrix.of(together), Matrix.of(x), Matrix.of(weight), 1.0, False)
    for row in range(5):
        one = Matrix.of(alone).lines(row, 1), Matrix.of(x).lines(row, 1)
        decoding.linear(*one, Matrix.of(weight), 1.0, False)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width):
    x, weight, bias = random(2, width), random(width, seed=1), random(width, seed=2)
    y = torch.empty(2, width)
    decoding.rms_norm(Matrix.of(y), Matrix.of(x), Matrix.of(weight), 1e-5)
    torch.testing.assert_close(y, reference.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-5)
    decoding.layer_norm(Matrix.of(y), Matrix.of(x), Matrix.of(weight), Matrix.of(bias), 1e-6)
    torch.testing.assert_close(y, F.layer_norm(x, (width,), weight, bias, 1e-6), rtol=1e-4, atol=1e-5)


def test_norm_and_copy_write_into_columns_of_wider_rows():
    x, weight, wide = random(2, 6), random(6), torch.zeros(2, 10)
    decoding.rms_norm(Matrix.of(wide).cut(3, 6), Matrix.of(x), Matrix.of(weight), 1e-6)
    decoding.copy(Matrix.of(wide).cut(0, 3), Matrix.of(x).cut(2, 3))
    torch.testing.assert_close(wide[:, 3:9], reference.rms_norm(x, weight, 1e-6))
    assert torch.equal(wide[:, :3], x[:, 2:5]) and not wide[:, 9].any()


@pytest.mark.parametrize("width", [4, 16, 19])
def test_heads(width):
    heads, plain, values = 3, 5, 7
    weight = random(heads * (plain + values), width)
    w_uk, w_uv = weight.view(heads, -1, width).split([plain, values], dim=1)
    x, y = random(2, heads, plain), torch.empty(2, heads, width)
    decoding.combine_heads(Matrix.of(y), Matrix.of(x), Matrix.of(weight), heads, 0)
    torch.testing.assert_close(y, torch.einsum("bhn,hnc->bhc", x, w_uk))
    z = torch.empty(2, heads, values)
    decoding.split_heads(Matrix.of(z), Matrix.of(y), Matrix.of(weight), heads, plain)
    torch.testing.assert_close(z, torch.einsum("bhc,hvc->bhv", y, w_uv), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_of_two_tokens_also_in_place(interleaved):
    table = rotation(torch.tensor([[17, 3]]), 8, 1e4, torch.float32, interleaved=interleaved)
    x, y = random(1, 2, 3, 8), torch.empty(6, 8)
    cos, sin = Matrix.of(table.cos_BT1R), Matrix.of(table.sin_BT1R)
    decoding.rotate(Matrix.of(y), Matrix.of(x), cos, sin, interleaved)
    torch.testing.assert_close(y, rotate(x, table).view(6, 8))
    decoding.rotate(Matrix.of(x), Matrix.of(x), cos, sin, interleaved)
    assert torch.equal(x.view(6, 8), y)


def test_swiglu_over_the_whole_range():
    gate, up = torch.linspace(-100, 100, 1001), random(1001)
    y = torch.empty(1001)
    decoding.swiglu(Matrix.of(y), Matrix.of(gate), Matrix.of(up))
    torch.testing.assert_close(y, F.silu(gate) * up, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("counts", [[0, 3], [1, 0], [7, 40], [45]])
def test_attention_of_every_token_to_its_own_rows(counts):
    tokens = len(counts)
    q, keys = random(tokens, 3, 21), random(90, 21)
    g = torch.Generator().manual_seed(1)
    places = [torch.randperm(90, generator=g)[:count].sort().values for count in counts]
    selected = torch.stack([F.pad(at, (0, 45 - len(at)), value=-1) for at in places])
    y = torch.empty(tokens, 3, 13)
    decoding.attend(Matrix.of(y), Matrix.of(q), Stored.of(keys), Matrix.of(selected), 0.3)
    expected = reference.sparse_attention(q[None], keys[None], selected[None], 13, 0.3)[0]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_attention_with_large_scores():
    q, keys = random(2, 16) * 50, random(100, 16)
    y, places = torch.empty(2, 16), torch.arange(100)
    decoding.attend(Matrix.of(y), Matrix.of(q), Stored.of(keys), Matrix.of(places), 1.0)
    torch.testing.assert_close(y, torch.softmax(q @ keys.T, -1) @ keys, rtol=1e-5, atol=1e-6)


def test_rows_from_and_to_places():
    pool, rows, places = random(9, 5), random(3, 5), torch.tensor([8, 0, 4])
    y = torch.empty(3, 5)
    decoding.gather(Matrix.of(y), Matrix.of(pool), Matrix.of(places))
    assert torch.equal(y, pool[places])
    decoding.scatter(Matrix.of(rows), Stored.of(pool), Matrix.of(places))
    assert torch.equal(pool[places], rows)
    for wrong in (torch.tensor([0, 9, 1]), torch.tensor([0, -1, 1]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="do not fit"):
            decoding.gather(Matrix.of(y), Matrix.of(pool), Matrix.of(wrong))


@pytest.mark.parametrize("normalise", [True, False])
def test_routing(normalise):
    logits, bias = random(4, 11), random(11)
    chosen, weights, scores = torch.empty(4, 3, dtype=torch.int64), torch.empty(4, 3), logits.clone()
    matrices = [Matrix.of(x) for x in (chosen, weights, scores, bias)]
    decoding.route(*matrices, normalise, 2.5)
    sigmoid = logits.sigmoid()
    expected = (sigmoid + bias).topk(3).indices
    assert torch.equal(chosen, expected)
    picked = sigmoid.gather(1, expected)
    if normalise:
        picked = picked / picked.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, 2.5 * picked, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores, sigmoid, rtol=1e-6, atol=1e-7)


def test_routing_finds_experts_whatever_the_scores_are():
    for value in (float("nan"), float("inf"), -float("inf"), 0.0):
        chosen, weights = torch.empty(1, 4, dtype=torch.int64), torch.empty(1, 4)
        scores, bias = torch.full((1, 6), value), torch.zeros(6)
        decoding.route(*(Matrix.of(x) for x in (chosen, weights, scores, bias)), True, 1.0)
        assert sorted(chosen[0].tolist()) == [0, 1, 2, 3]


def test_experts_add_to_the_output():
    x, gate_up, down = random(3, 12), random(5, 2 * 9, 12), random(5, 12, 9)
    chosen, weights = torch.tensor([[0, 4], [2, 1], [3, 3]]), random(3, 2)
    y, hidden = random(3, 12, seed=9), torch.empty(1, 18)
    expected = y + reference.experts(x, chosen, weights, gate_up, down)
    decoding.experts(*(Matrix.of(t) for t in (y, x, chosen, weights, gate_up, down, hidden)))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    chosen[0, 0] = 5
    with pytest.raises(ValueError, match="do not fit"):
        decoding.experts(*(Matrix.of(t) for t in (y, x, chosen, weights, gate_up, down, hidden)))


def test_sizes_that_do_not_fit_are_refused():
    x, y, weight = Matrix.of(random(2, 6)), Matrix.of(random(2, 4)), Matrix.of(random(4, 5))
    with pytest.raises(ValueError, match="do not fit"):
        decoding.linear(y, x, weight, 1.0, False)
    with pytest.raises(ValueError, match="do not fit"):
        decoding.rms_norm(x, x, Matrix.of(random(5)), 1e-5)
    pool, three = random(3, 6), torch.tensor([3])
    with pytest.raises(ValueError, match="do not fit"):
        decoding.attend(y.cut(0, 1), x, Stored.of(pool), Matrix.of(three), 1.0)
    with pytest.raises(ValueError, match="do not fit"):  # more of a head than it has
        decoding.combine_heads(Matrix.of(random(2, 6)), x, Matrix.of(random(10, 6)), 2, 0)
    with pytest.raises(ValueError, match="do not fit"):
        decoding.split_heads(y, x, Matrix.of(random(10, 6)), 2, 2)
    nothing = torch.empty(1, 0)
    chosen = Matrix.of(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit"):
        decoding.experts(Matrix.of(nothing), Matrix.of(nothing), chosen, *[Matrix.of(random(1, 1))] * 4)
    with pytest.raises(TypeError, match="tuple"):
        decoding.copy([1, 2, 3, 4], x)
    with pytest.raises(TypeError, match="expected 2"):
        decoding.copy(x)
    with pytest.raises(ValueError, match="contiguous"):
        Matrix.of(random(4, 4).T)
    with pytest.raises(ValueError, match="fp32"):
        Matrix.of(random(4).double())
