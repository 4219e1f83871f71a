"""Every fast path of `ops` against the plain function of the same name in `ops/reference.py`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.errors import InputError
from glm5.ops import attention, experts, indexer_loss, reference, selection
from glm5.ops.norm import RMSNorm
from glm5.ops.rotary import rotate, rotation
from glm5.ops.spans import Spans, plain_spans, segment_spans


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def packed_spans(batch: int, tokens: int, seed: int) -> Spans:
    """Rows of random documents, the last ones padded."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.rand(batch, tokens, generator=generator) < 0.15
    segments = cuts.cumsum(1)
    segments[:, -(tokens // 6) :] = torch.where(torch.arange(batch) % 2 == 0, -1, segments[:, -1])[:, None]
    return segment_spans(segments, tokens, None)


SPANS = {
    "plain": lambda: plain_spans(2, 60, 0, None, torch.device("cpu")),
    "packed and padded": lambda: packed_spans(2, 60, seed=3),
}


@pytest.fixture(params=SPANS)
def spans(request: pytest.FixtureRequest) -> Spans:
    return SPANS[request.param]()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets so small that every loop over blocks takes several turns."""
    monkeypatch.setattr(attention, "BLOCK_BUDGET", 600)
    monkeypatch.setattr(indexer_loss, "BLOCK_BUDGET", 600)
    monkeypatch.setattr(selection, "SCORE_BUDGET", 700)
    monkeypatch.setattr(selection, "KEY_BLOCK", 16)


# ---- selection ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [1, 7, 24, 80])
def test_blocked_selection_is_the_reference(spans, k):
    q, keys, w = draw(2, 60, 5, 6), draw(2, 60, 6), draw(2, 60, 5)
    expected = reference.select(reference.index_scores(q, keys, w), spans.lo_BT, spans.hi_BT, k)
    assert torch.equal(selection.select(q, keys, w, spans, k), expected)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 30), heads=st.integers(1, 3), levels=st.integers(1, 3))
def test_ties_go_to_the_lowest_position(seed, k, heads, levels):
    """Whole numbers tie all the time, and ReLU zeros more so; arithmetic on them is exact, so equality is too."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-levels, levels + 1, (1, 40, heads, 4), generator=generator).double()
    keys = torch.randint(-levels, levels + 1, (1, 40, 4), generator=generator).double()
    w = torch.randint(-1, 2, (1, 40, heads), generator=generator).double()
    spans = packed_spans(1, 40, seed)
    expected = reference.select(reference.index_scores(q, keys, w), spans.lo_BT, spans.hi_BT, k)
    assert torch.equal(selection.select(q, keys, w, spans, k), expected)
    assert torch.equal(selection.select(q.float(), keys.float(), w.float(), spans, k), expected)


def test_reference_selection_by_hand():
    scores = torch.tensor([[[5.0, 1.0, 5.0, 0.0, 9.0], [2.0, 2.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]]])
    lo, hi = torch.tensor([[0, 0, 2]]), torch.tensor([[4, 5, 2]])
    assert reference.select(scores, lo, hi, 2).tolist() == [[[0, 2], [0, 1], [-1, -1]]]
    assert reference.select(scores, lo, hi, 6)[0, 0].tolist() == [0, 1, 2, 3, -1, -1]


def test_everything_is_what_selection_gives_when_all_fits(spans):
    q, keys, w = draw(2, 60, 5, 6), draw(2, 60, 6), draw(2, 60, 5)
    assert torch.equal(selection.everything(spans, 60), selection.select(q, keys, w, spans, 60))


# ---- attention ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("width", "value_width"), [(12, 8), (8, 12), (8, 8)])
def test_expanded_attention_is_the_reference(spans, width, value_width):
    q, k, v = draw(2, 60, 3, width), draw(2, 60, 3, width, seed=1), draw(2, 60, 3, value_width)
    expected = reference.dense_attention(q, k, v, spans.lo_BT, spans.hi_BT, 0.3)
    torch.testing.assert_close(attention.expanded_attention(q, k, v, spans, 0.3), expected)


@pytest.mark.usefixtures("small_blocks")
def test_expanded_attention_over_a_selection_is_the_reference(spans):
    selected = reference.select(draw(2, 60, 60), spans.lo_BT, spans.hi_BT, 9)
    q, k, v = draw(2, 60, 3, 8), draw(2, 60, 3, 8, seed=1), draw(2, 60, 3, 6)
    expected = reference._attend(q, k, v, reference.chosen(selected, 60), 0.3)
    torch.testing.assert_close(attention.expanded_attention(q, k, v, spans, 0.3, selected), expected)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("selects", [True, False])
def test_masked_attention_in_bf16_and_its_gradients_are_the_reference(spans, selects, autocast, monkeypatch):
    """Beside the reference in fp64 on the same rounded inputs, padding included; and PyTorch's kernel was not asked."""
    monkeypatch.setattr(attention, "_fused", None)
    if not selects:  # a plain row without a selection needs no mask
        spans = packed_spans(2, 60, seed=3)
    mask = reference.visible(spans.lo_BT, spans.hi_BT, 60)
    selected = reference.select(draw(2, 60, 60), spans.lo_BT, spans.hi_BT, 9) if selects else None
    if selected is not None:
        mask = reference.chosen(selected, 60)
    rounded = [draw(2, 60, 3, width, seed=width).bfloat16() for width in (12, 12, 8)]
    cotangent = draw(2, 60, 3, 8, seed=1).bfloat16()
    q, k, v = inputs = [(x.float() if autocast else x.clone()).requires_grad_() for x in rounded]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention.expanded_attention(q, k, v, spans, 0.3, selected)
    ours = out, *torch.autograd.grad(out, inputs, cotangent)
    assert out.dtype == torch.bfloat16
    inputs = [x.double().requires_grad_() for x in rounded]
    expected = reference._attend(*inputs, mask, 0.3)
    for mine, truth in zip(ours, (expected, *torch.autograd.grad(expected, inputs, cotangent.double())), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=2e-2, atol=1e-2 * float(truth.detach().abs().max()))


def test_masked_attention_is_left_out_where_its_probabilities_would_not_fit(monkeypatch):
    asked = []
    fused = attention._fused
    monkeypatch.setattr(attention, "_fused", lambda *given: asked.append(1) or fused(*given))
    q, k, v = (draw(2, 60, 3, 8, seed=i).bfloat16().requires_grad_() for i in range(3))
    spans = packed_spans(2, 60, seed=3)
    attention.expanded_attention(q, k, v, spans, 0.3)
    assert not asked
    monkeypatch.setattr(attention, "BLOCK_BUDGET", 2 * 60 * 3 * 60 - 1)
    attention.expanded_attention(q, k, v, spans, 0.3)
    assert asked


@pytest.mark.usefixtures("small_blocks")
def test_absorbed_attention_is_the_reference(spans):
    q, latents = draw(2, 60, 3, 10), draw(2, 60, 10)
    shared = latents[:, :, None].expand(-1, -1, 3, -1)
    expected = reference.dense_attention(q, shared, shared[..., :7], spans.lo_BT, spans.hi_BT, 0.3)
    torch.testing.assert_close(attention.absorbed_attention(q, latents, spans, 7, 0.3), expected)


def test_absorbed_attention_of_one_new_token():
    q, latents = draw(2, 1, 3, 10), draw(2, 33, 10)
    spans = plain_spans(2, 1, 32, None, q.device)
    shared = latents[:, :, None].expand(-1, -1, 3, -1)
    expected = reference.dense_attention(q, shared, shared[..., :7], spans.lo_BT, spans.hi_BT, 0.3)
    torch.testing.assert_close(attention.absorbed_attention(q, latents, spans, 7, 0.3), expected)


@pytest.mark.usefixtures("small_blocks")
def test_sparse_attention_and_its_gradients_are_the_reference(spans):
    selected = reference.select(draw(2, 60, 60), spans.lo_BT, spans.hi_BT, 9)
    cotangent = draw(2, 60, 3, 7)
    grads = []
    for function in (attention.sparse_attention, reference.sparse_attention):
        q, latents = draw(2, 60, 3, 10).requires_grad_(), draw(2, 60, 10).requires_grad_()
        out = function(q, latents, selected, 7, 0.3)
        grads.append((out, *torch.autograd.grad(out, (q, latents), cotangent)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("small_blocks")
def test_sparse_attention_under_autocast_rounds_the_inputs_only(spans):
    selected = reference.select(draw(2, 60, 60), spans.lo_BT, spans.hi_BT, 9)
    grads = []
    for autocast in (True, False):
        q, latents = (draw(2, 60, *shape).bfloat16().float().requires_grad_() for shape in ((3, 10), (10,)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attention.sparse_attention(q, latents, selected, 7, 0.3)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        grads.append((out.float(), *torch.autograd.grad(out.float().square().sum(), (q, latents))))
    for ours, theirs in zip(*grads, strict=True):
        assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 0.02


def test_sparse_attention_over_everything_is_dense_attention(spans):
    q, latents = draw(2, 60, 3, 10), draw(2, 60, 10)
    dense = attention.absorbed_attention(q, latents, spans, 7, 0.3)
    sparse = attention.sparse_attention(q, latents, selection.everything(spans, 60), 7, 0.3)
    torch.testing.assert_close(sparse, dense)


# ---- indexer loss ---------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sparse", [False, True])
def test_blocked_indexer_kl_is_the_reference(spans, sparse):
    q, latents = draw(2, 60, 3, 10), draw(2, 60, 10)
    index = (draw(2, 60, 4, 6).requires_grad_(), draw(2, 60, 6).requires_grad_(), draw(2, 60, 4).requires_grad_())
    mask = reference.visible(spans.lo_BT, spans.hi_BT, 60)
    selected = None
    if sparse:
        selected = reference.select(draw(2, 60, 60), spans.lo_BT, spans.hi_BT, 9)
        padded = torch.zeros(2, 60, 61, dtype=torch.bool).scatter_(-1, selected.masked_fill(selected < 0, 60), True)
        mask = padded[..., :60]
    p = reference.masked_softmax(torch.einsum("bthc,bsc->bhts", q, latents) * 0.3, mask[:, None])
    expected = reference.indexer_kl(p, reference.index_scores(*index), mask).sum() / spans.valid_BT.sum()
    ours = indexer_loss.indexer_kl(q, latents, 0.3, index, spans, selected)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(torch.autograd.grad(ours, index), torch.autograd.grad(expected, index), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_indexer_kl_against_torch():
    """One query, one head: the KL divergence that `torch.nn.functional.kl_div` computes."""
    attention_1S, scores_1S = torch.softmax(draw(1, 9), -1), draw(1, 9, seed=4)
    ours = reference.indexer_kl(attention_1S[:, None, None], scores_1S[:, None], torch.ones(1, 1, 9, dtype=torch.bool))
    expected = F.kl_div(torch.log_softmax(scores_1S, -1), attention_1S, reduction="sum")
    torch.testing.assert_close(ours[0, 0], expected)


# ---- experts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("function", [experts.paired_experts, experts.grouped_experts])
def test_experts_are_the_reference(function, tokens, dtype):
    x, gate_up, down = draw(tokens, 16), draw(8, 32, 16), draw(8, 16, 16)
    chosen = draw(tokens, 8).argsort(-1)[:, :3]
    chosen[0] = torch.tensor([0, 1, 2])  # experts 6 and 7 may stay empty when there is one token
    weights = torch.rand(tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference.experts(x, chosen, weights, gate_up, down)
    ours = function(x.to(dtype), chosen, weights.to(dtype), gate_up.to(dtype), down.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_gradients_of_grouped_experts_are_the_reference():
    chosen = draw(40, 8).argsort(-1)[:, :2]
    chosen[chosen == 5] = 4  # an empty expert, and tokens that use one expert twice
    grads = []
    for function in (experts.grouped_experts, reference.experts):
        inputs = [draw(*shape, dtype=torch.float32).requires_grad_() for shape in ((40, 16), (8, 24, 16), (8, 16, 12))]
        weights = draw(40, 2, dtype=torch.float32).requires_grad_()
        out = function(inputs[0], chosen, weights, inputs[1], inputs[2])
        grads.append(torch.autograd.grad(out.square().sum(), [*inputs, weights]))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def test_odd_widths_fall_back_to_the_loop():
    x, gate_up, down = (draw(*shape, dtype=torch.float32) for shape in ((20, 15), (4, 14, 15), (4, 15, 7)))
    chosen, weights = draw(20, 4).argsort(-1)[:, :2], draw(20, 2, dtype=torch.float32)
    expected = reference.experts(x, chosen, weights, gate_up, down)
    torch.testing.assert_close(experts.run_experts(x, chosen, weights, gate_up, down), expected)


# ---- norm, rotary, spans --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_reference(dtype):
    norm = RMSNorm(24, 1e-6, dtype=dtype, device=None)
    norm.weight.data.copy_(draw(24))
    x = draw(5, 24).to(dtype)
    torch.testing.assert_close(norm(x), reference.rms_norm(x, norm.weight, 1e-6))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_multiplication_by_a_unit_complex_number(interleaved):
    positions = torch.tensor([[0, 1, 7, 1000]])
    x = draw(1, 4, 2, 8)
    turned = rotate(x, rotation(positions, 8, 1e4, torch.float64, interleaved=interleaved))
    pair = (lambda y: y.unflatten(-1, (4, 2))) if interleaved else (lambda y: y.unflatten(-1, (2, 4)).transpose(-1, -2))
    angle = positions.double()[..., None, None] * 1e4 ** (-torch.arange(4).double() / 4)
    expected = torch.view_as_complex(pair(x).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(torch.view_as_complex(pair(turned).contiguous()), expected)


def test_spans_of_packed_rows_by_hand():
    spans = segment_spans(torch.tensor([[-1, 3, 3, 0, 0, 0, -1]]), 7, None)
    assert spans.lo_BT.tolist() == [[0, 1, 1, 3, 3, 3, 6]]
    assert spans.hi_BT.tolist() == [[0, 2, 3, 4, 5, 6, 6]]
    assert spans.positions_BT.tolist() == [[0, 0, 1, 0, 1, 2, 0]]
    assert spans.valid_BT.tolist() == [[False, True, True, True, True, True, False]]


def test_a_segment_in_two_pieces_is_refused():
    with pytest.raises(InputError, match="one id for two separate runs"):
        segment_spans(torch.tensor([[0, 0, 1, 0]]), 4, None)


def test_positions_outside_the_latents_are_refused():
    """With several rows they would be the next row's latents."""
    q_BTHC, latents_BSC = torch.randn(2, 1, 2, 6), torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match="position 5 is outside the 5 latents"):
        attention.sparse_attention(q_BTHC, latents_BSC, torch.tensor([[[0, 5]], [[0, 1]]]), 4, 1.0)
