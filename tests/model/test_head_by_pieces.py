"""The head by pieces against PyTorch's own, and how many logits it holds."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glm5.config import ModelConfig
from glm5.model import GLM5, by_pieces, logits_in, without_head


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_pieces_equal_those_of_pytorch(reduction):
    """`linear_cross_entropy` makes its gradients going forward (sum) or by itself (none)."""
    torch.manual_seed(0)
    model = GLM5(dataclasses.replace(ModelConfig.from_preset("nano"), vocab_size=301)).double()
    states_ND, targets_N = torch.randn(29, 128, dtype=torch.float64), torch.randint(0, 301, (29,))
    weights_N = torch.rand(29, dtype=torch.float64)

    def judge(logits_NV, targets_N):
        return F.cross_entropy(logits_NV, targets_N, reduction="none")

    def theirs(model, states_ND, targets_N):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=4, chunking_method=None)
        given = (states_ND, model.lm_head.weight, targets_N)
        return F.linear_cross_entropy(*given, reduction=reduction, options=options)

    def ours(model, states_ND, targets_N):
        nats_N = torch.cat(by_pieces(model, states_ND, targets_N, judge, 4 * 301))
        return nats_N.sum() if reduction == "sum" else nats_N

    results = []
    for head in (ours, theirs):
        x_ND = states_ND.clone().requires_grad_()
        loss = head(model, x_ND, targets_N)
        (loss if reduction == "sum" else loss @ weights_N).backward()
        results.append((loss.detach(), x_ND.grad, model.lm_head.weight.grad))
        model.zero_grad(set_to_none=True)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_gradients_of_many_pieces_are_summed_in_float32_under_autocast():
    """Autocast would narrow the head once for all pieces, and their gradients would be summed in bf16."""
    torch.manual_seed(0)
    model = GLM5(dataclasses.replace(ModelConfig.from_preset("nano"), vocab_size=301))
    states_ND, targets_N = torch.randn(512, 128), torch.randint(0, 301, (512,))

    def judge(logits_NV, targets_N):
        return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")

    found = []
    for most, bf16 in ((1 << 26, False), (1 << 26, True), (8 * 301, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = torch.stack(by_pieces(model, states_ND, targets_N, judge, most)).sum()
        loss.backward()
        found.append(model.lm_head.weight.grad)
        model.zero_grad(set_to_none=True)
    once, often = ((gradient - found[0]).norm() / found[0].norm() for gradient in found[1:])
    assert often < 1.1 * once < 0.01


def test_pieces_are_as_large_as_allowed():
    model, seen = GLM5(dataclasses.replace(ModelConfig.from_preset("nano"), vocab_size=301)), []
    states_ND, targets_N = torch.randn(10, 128), torch.zeros(10, dtype=torch.int64)
    for most in (3011, 3010, 3009, 2 * 301, 300):
        pieces = by_pieces(model, states_ND, targets_N, lambda logits_NV, _: len(logits_NV), most)
        assert sum(pieces) == 10
        seen.append(max(pieces))
    assert seen == [10, 10, 9, 2, 1]  # a token is never cut
    assert by_pieces(model, states_ND[:0], targets_N[:0], lambda logits_NV, _: len(logits_NV), 301) == [0]


@pytest.mark.parametrize(("heads", "runs"), [(1, 1), (2, 2)])
def test_logits_are_kept_only_where_those_of_all_heads_fit(heads, runs):
    model, ran = GLM5(dataclasses.replace(ModelConfig.from_preset("nano"), vocab_size=301)), []
    model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    states_ND, targets_N = torch.randn(10, 128, requires_grad=True), torch.zeros(10, dtype=torch.int64)
    (loss,) = by_pieces(model, states_ND, targets_N, F.cross_entropy, 10 * 301, heads=heads)
    loss.backward()
    assert len(ran) == runs


def test_the_head_is_left_out_where_all_logits_would_be_too_many():
    model, ids = GLM5(ModelConfig.from_preset("nano")), torch.zeros(2, 8, dtype=torch.int64)
    model.mtp_steps = 3
    for collect, heads in ((frozenset(), 1), ({"router", "mtp"}, 4)):
        logits = 16 * 4096 * heads
        assert without_head(model, ids, collect, logits) == collect
        assert without_head(model, ids, collect, logits - 1) == {*collect, "states"}
    assert logits_in(256) * 4 == 256 << 20
