"""Single formulas of the model written a second time, straight from the published equations, against the modules.

What parity with `transformers` cannot see: the indexer's loss (it has none), multi-token prediction (it has none), the
scales that a top-k does not notice, epsilons that a wide initialisation drowns, and precision under autocast.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor

import glm5
from glm5.model.mla import MLA
from glm5.model.moe import Router, record_router
from glm5.ops.indexer_loss import indexer_kl
from glm5.ops.linear import Linear, LowRank
from glm5.ops.rotary import Rotation, rotation
from glm5.ops.spans import plain_spans

IDS = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(5))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotates interleaved pairs by position: [B, T, H, R] as complex numbers."""
    width = x.shape[-1]
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * theta ** (-torch.arange(0, width, 2).to(x.dtype) / width)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def attention_of(layer: MLA, x: Tensor) -> Tensor:
    """Probabilities [B, H, T, S] of dense MLA in the expanded form (DeepSeek-V3 report, equations 1-11)."""
    c = layer.config
    c_q = rms(x @ layer.q_a_proj.weight.T, layer.q_a_layernorm.weight, c.latent_norm_eps)
    q = (c_q @ layer.q_b_proj.weight.T).unflatten(-1, (c.num_attention_heads, -1))
    compressed = x @ layer.kv_a_proj_with_mqa.weight.T
    c_kv = rms(compressed[..., : c.kv_lora_rank], layer.kv_a_layernorm.weight, c.latent_norm_eps)
    k = (c_kv @ layer.kv_b_proj.weight.T).unflatten(-1, (c.num_attention_heads, -1))[..., : c.qk_nope_head_dim]
    k_rope = turned(compressed[..., None, c.kv_lora_rank :], c.rope_theta)
    q_rope = turned(q[..., c.qk_nope_head_dim :], c.rope_theta)
    scores = torch.einsum("bthn,bshn->bhts", q[..., : c.qk_nope_head_dim], k)
    scores = scores + torch.einsum("bthr,bsr->bhts", q_rope, k_rope[:, :, 0])
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return torch.softmax((scores / c.qk_head_dim**0.5).masked_fill(~causal, -torch.inf), -1)


def index_scores_of(layer: MLA, x: Tensor) -> Tensor:
    """I [B, T, S] (DeepSeek-V3.2 report, equation 1, with the scales of its code)."""
    c, indexer = layer.config, layer.indexer
    c_q = rms(x @ layer.q_a_proj.weight.T, layer.q_a_layernorm.weight, c.latent_norm_eps)
    q = (c_q @ indexer.wq_b.weight.T).unflatten(-1, (c.index_n_heads, c.index_head_dim))
    k = F.layer_norm(x @ indexer.wk.weight.T, (c.index_head_dim,), indexer.k_norm.weight, indexer.k_norm.bias, 1e-6)
    r = c.qk_rope_head_dim
    q = torch.cat((turned(q[..., :r], c.rope_theta), q[..., r:]), -1)
    k = torch.cat((turned(k[:, :, None, :r], c.rope_theta)[:, :, 0], k[..., r:]), -1)
    w = (x @ indexer.weights_proj.weight.T) * c.index_n_heads**-0.5
    return torch.einsum("bth,bths->bts", w, F.relu(torch.einsum("bthi,bsi->bths", q, k) * c.index_head_dim**-0.5))


def kl(attention: Tensor, scores: Tensor) -> Tensor:
    """Mean over the queries of KL(head-summed attention, normalised || softmax of the index scores)."""
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    p = attention.sum(1) / attention.sum((1, 3))[..., None]
    log_q = torch.log_softmax(scores.masked_fill(~causal, -torch.inf), -1).masked_fill(~causal, 0.0)
    return (torch.xlogy(p, p) - p * log_q).sum(-1).mean()


def inputs_of_attention(model: glm5.GLM5) -> list[Tensor]:
    """What each layer's attention reads in a dense pass."""
    seen: list[Tensor] = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        for layer in model.model.layers
    ]
    model(IDS, attention="dense")
    for hook in hooks:
        hook.remove()
    return seen


def test_indexer_kl_by_the_published_formulas():
    model = tiny_model(4, std=0.3, dtype=torch.float64)
    out = model(IDS, attention="dense", collect={"indexer_kl"})
    for i, x in enumerate(inputs_of_attention(model)):
        layer = model.model.layers[i].self_attn
        expected = kl(attention_of(layer, x), index_scores_of(layer, x))
        assert expected > 0.1
        torch.testing.assert_close(out.indexer_kl[i], expected)


def test_a_shared_indexer_learns_from_the_mean_over_its_layers():
    model = tiny_model(4, std=0.3, dtype=torch.float64, indexer_types=("full", "shared"))
    out = model(IDS, attention="dense", collect={"indexer_kl"})
    first, second = inputs_of_attention(model)
    layers = [layer.self_attn for layer in model.model.layers]
    scores = index_scores_of(layers[0], first)
    terms = [kl(attention_of(layers[0], first), scores), kl(attention_of(layers[1], second), scores)]
    assert abs(terms[0] - terms[1]) > 1e-3
    torch.testing.assert_close(out.indexer_kl[0], torch.stack(terms).mean())


def test_multi_token_prediction_by_the_published_formulas():
    """DeepSeek-V3 report, equations 21-23: embedding first, both sides normalised, the trunk's embedding and head."""
    model = tiny_model(4, std=0.3, dtype=torch.float64)
    module, c = model.mtp[0], model.config
    for norm in (module.enorm, module.hnorm, module.shared_head.norm):
        norm.weight.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    entered: list[Tensor] = []
    left: list[Tensor] = []
    module.input_layernorm.register_forward_hook(lambda m, args, out: entered.append(args[0]))
    module.register_forward_hook(lambda m, args, out: left.append(out[0]))
    out = model(IDS, collect={"hidden", "mtp"})
    following = torch.cat((IDS[:, 1:], torch.zeros(1, 1, dtype=torch.int64)), 1)
    embedded = model.model.embed_tokens.weight[following]
    joined = torch.cat(
        (rms(embedded, module.enorm.weight, c.rms_norm_eps), rms(out.hidden, module.hnorm.weight, c.rms_norm_eps)), -1
    )
    torch.testing.assert_close(entered[0], joined @ module.eh_proj.weight.T)
    expected = rms(left[0], module.shared_head.norm.weight, c.rms_norm_eps) @ model.lm_head.weight.T
    torch.testing.assert_close(out.mtp_logits[0], expected)


def test_balance_loss_by_the_published_formulas():
    """DeepSeek-V3 report, equations 17-20, over the real tokens of each row; the load counts what really ran."""
    scores = torch.rand(2, 9, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 5:] = False
    ran = torch.tensor([4, 5]).expand(2, 9, 2)  # as a correction bias might have it
    record = record_router(1, ran, scores, valid)
    losses = []
    for row, tokens in ((0, 9), (1, 5)):
        s = scores[row, :tokens]
        preferred = torch.zeros_like(s).scatter_(1, s.topk(2).indices, 1.0)
        f = preferred.sum(0) * 6 / (2 * tokens)
        p = (s / s.sum(-1, keepdim=True)).mean(0)
        losses.append((f * p).sum())
    torch.testing.assert_close(record.balance, torch.stack(losses).mean())
    assert record.load_E.tolist() == [0, 0, 0, 0, 14, 14]
    even = torch.eye(6, dtype=torch.float64).repeat(1, 2, 1) + 1e-9
    chosen = even.topk(1).indices
    assert record_router(1, chosen, even, torch.ones(1, 12, dtype=torch.bool)).balance == pytest.approx(1.0)


def test_epsilons():
    model = tiny_model(0, latent_norm_eps=3e-6, rms_norm_eps=2e-5)
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            assert module.eps == 3e-6, name
        elif name.endswith("k_norm"):
            assert module.eps == 1e-6, name
        elif name.endswith(("layernorm", "norm")):
            assert module.eps == 2e-5, name


@pytest.mark.parametrize("autocast", [False, True])
def test_the_router_and_the_index_weights_are_computed_in_fp32(autocast):
    model = tiny_model(2, dtype=torch.float32 if autocast else torch.bfloat16)
    router = model.model.layers[1].mlp.gate
    indexer = model.model.layers[1].self_attn.indexer
    assert isinstance(router, Router)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, weights, scores = router(x)
        w = indexer(x[None], torch.zeros(1, 50, 24, dtype=x.dtype), _no_rotation(50, x.dtype))[2]
    assert weights.dtype == scores.dtype == w.dtype == torch.float32
    torch.testing.assert_close(scores, (x.float() @ router.weight.float().T).sigmoid())
    torch.testing.assert_close(w[0], x.float() @ indexer.weights_proj.weight.T * (16 * 8) ** -0.5)


def _no_rotation(tokens: int, dtype: torch.dtype) -> Rotation:
    return rotation(torch.zeros(1, tokens, dtype=torch.int64), 4, 1e4, dtype, interleaved=True)


def test_the_indexer_loss_is_the_same_under_autocast():
    index = (torch.randn(1, 20, 4, 8), torch.randn(1, 20, 8), torch.randn(1, 20, 4))
    spans = plain_spans(1, 20, 0, None, torch.device("cpu"))
    arguments = (torch.randn(1, 20, 2, 20), torch.randn(1, 20, 20), 0.2, index, spans, None)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = indexer_kl(*arguments)
    assert torch.equal(narrow, indexer_kl(*arguments))


def test_an_adapter_adds_alpha_over_rank_times_the_product():
    linear = Linear(6, 5, dtype=torch.float64, device=None)
    linear.weight.data.normal_()
    linear.adapter = LowRank(linear.weight, 3, alpha=12.0)
    linear.adapter.lora_B.data.normal_()
    delta = 4.0 * linear.adapter.lora_B @ linear.adapter.lora_A
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(linear(x), x @ (linear.weight + delta).T)
    torch.testing.assert_close(linear.effective_weight(), linear.weight + delta)
