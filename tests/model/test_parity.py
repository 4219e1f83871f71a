"""Our logits against `transformers`' `glm_moe_dsa`, an independent implementation, on random shapes and weights.

Choices may differ where two keys, or two experts, score alike to the last bits; the logits then differ for an honest
reason. So the comparison has two parts: with their choices replayed in our model the logits agree everywhere, and our
own choices are theirs, but for a query or two, and our own logits agree wherever they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from torch import Tensor
from transformers import GlmMoeDsaForCausalLM
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaDecoderLayer, GlmMoeDsaMoE

import glm5
from glm5.checkpoint import load_model, save_model
from glm5.model import LatentCache, Replay, initialize_

INDEX_SHARE = ["F", "FS", "FFSF", "FSSFSS"]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(1, 6))
    pattern = draw(st.sampled_from(INDEX_SHARE))
    rope = draw(st.sampled_from([2, 4, 8]))
    return {
        "config": tiny_config(
            num_hidden_layers=layers,
            first_k_dense_replace=draw(st.integers(0, layers)),
            indexer_types=tuple({"F": "full", "S": "shared"}[pattern[i % len(pattern)]] for i in range(layers)),
            num_attention_heads=draw(st.sampled_from([1, 2, 4])),
            qk_nope_head_dim=draw(st.sampled_from([4, 8, 12])),
            qk_rope_head_dim=rope,
            v_head_dim=draw(st.sampled_from([4, 8, 16])),
            index_n_heads=draw(st.sampled_from([16, 24])),
            index_head_dim=rope + draw(st.sampled_from([4, 8])),
            index_topk=draw(st.sampled_from([4, 8, 16, 64])),
            n_routed_experts=8,
            n_group=(groups := draw(st.sampled_from([1, 2, 4]))),
            topk_group=draw(st.integers(1, groups)),
            norm_topk_prob=draw(st.booleans()),
            n_shared_experts=draw(st.integers(1, 2)),
            num_nextn_predict_layers=0,
            pad_token_id=0,
            eos_token_id=1,
            rope_parameters={"rope_theta": draw(st.sampled_from([1e4, 1e6])), "rope_type": "default"},
        ),
        "tokens": draw(st.sampled_from([3, 20, 70, 150])),
        "batch": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**16)),
        "padded": draw(st.booleans()),
        "format": draw(st.sampled_from(["fp32", "fp32", "bf16", "fp8"])),
        "saved_by": draw(st.sampled_from(["us", "them"])),
    }


def random_model(config: glm5.ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> glm5.GLM5:
    model = glm5.GLM5(config, dtype=dtype)
    initialize_(model, 0.15, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # make the bias decide something
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms of one would hide a norm in the wrong place
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def their_model(directory: Any, dtype: torch.dtype) -> GlmMoeDsaForCausalLM:
    return GlmMoeDsaForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def both(case: dict[str, Any], directory: Any) -> tuple[glm5.GLM5, GlmMoeDsaForCausalLM]:
    """The same weights in both implementations, saved by either side and loaded by the other."""
    dtype = torch.bfloat16 if case["format"] == "bf16" else torch.float32
    ours = random_model(case["config"], case["seed"], dtype)
    if case["format"] == "fp8":  # the file decides: both sides read what was rounded to FP8
        save_model(ours, directory, quantization="fp8")
        ours = load_model(directory, dtype=torch.float32)
        save_model(ours, directory / "wide")
        return ours, their_model(directory / "wide", torch.float32)
    save_model(ours, directory)
    theirs = their_model(directory, dtype)
    if case["saved_by"] == "them":
        theirs.save_pretrained(directory / "theirs", max_shard_size="20KB")
        ours = load_model(directory / "theirs", dtype=dtype)
    return ours.eval(), theirs


def their_logits(theirs: GlmMoeDsaForCausalLM, ids: Tensor, mask: Tensor) -> tuple[Tensor, Replay]:
    """Logits, and what every indexer and router chose; indices that their causal mask removes become -1."""
    chosen = Replay()

    def record(layer: int, decoder: GlmMoeDsaDecoderLayer) -> None:
        if decoder.self_attn.indexer is not None:
            decoder.self_attn.indexer.register_forward_hook(
                lambda module, inputs, out: chosen.positions.__setitem__(layer, out.long())
            )
        if isinstance(decoder.mlp, GlmMoeDsaMoE):
            decoder.mlp.gate.register_forward_hook(
                lambda module, inputs, out: chosen.experts.__setitem__(layer, out[2].unflatten(0, ids.shape))
            )

    for layer, decoder in enumerate(theirs.model.layers):
        record(layer, decoder)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    queries, end = torch.arange(ids.shape[1])[None, :, None], ids.shape[1]
    for layer, at in chosen.positions.items():
        seen = (at <= queries) & mask.bool().gather(1, at.flatten(1)).view_as(at)
        at = torch.where(seen, at, end).sort(-1).values
        chosen.positions[layer] = at.masked_fill(at == end, -1)
    return logits.float(), chosen


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def assert_parity(case: dict[str, Any], directory: Any) -> None:
    ours, theirs = both(case, directory)
    config, tokens = case["config"], case["tokens"]
    generator = torch.Generator().manual_seed(case["seed"])
    ids = torch.randint(2, config.vocab_size, (case["batch"], tokens), generator=generator)
    mask = torch.ones_like(ids)
    if case["padded"]:  # left padding, as generation pads
        for row in range(1, case["batch"]):
            mask[row, : min(row * tokens // 4, tokens - 1)] = 0
    real = mask.bool()
    reference, chosen = their_logits(theirs, ids, mask)
    segments = torch.where(real, 0, -1)
    with torch.no_grad():
        replay = Replay(experts=chosen.experts, positions=chosen.positions if tokens > config.index_topk else {})
        replayed = ours(ids, segment_ids_BT=segments, replay=replay).logits.float()
        free = ours(ids, segment_ids_BT=segments, collect={"selection", "router"})
    if case["format"] == "bf16":  # 8 bits: near-ties are common and the largest of many errors is large
        error = (replayed[real] - reference[real]).square().mean().sqrt() / reference[real].square().mean().sqrt()
        assert error < 0.03, "logits with their choices"
        return
    assert relative(replayed[real], reference[real]) < 1e-4, "logits with their choices"
    differs = torch.zeros_like(real)
    for layer, at in chosen.positions.items():
        mine = F.pad(free.selection[layer], (0, at.shape[-1] - free.selection[layer].shape[-1]), value=-1)
        differs |= (mine != at).any(-1)
    for record in free.router:
        differs |= (record.experts_BTK.sort(-1).values != chosen.experts[record.layer].sort(-1).values).any(-1)
    differs &= real
    assert int(differs.sum()) <= 2, "only near-ties may be chosen differently"
    same = real & ~differs.int().cummax(1).values.bool()  # later tokens see the states of earlier ones
    assert relative(free.logits.float()[same], reference[same]) < 1e-4, "logits where the choices agree"


@settings(
    max_examples=48, deadline=None, derandomize=True, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(case=cases())
def test_logits_equal_transformers(case, tmp_path_factory):
    assert_parity(case, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("pattern", ["FFF", "FSF"])
def test_greedy_continuations_equal_transformers(pattern, tmp_path):
    """64 tokens with both caches, from below `index_topk` to far above it."""
    config = tiny_config(
        num_hidden_layers=3, indexer_types=tuple({"F": "full", "S": "shared"}[p] for p in pattern),
        index_topk=16, num_nextn_predict_layers=0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    ours = random_model(config, seed=3)
    save_model(ours, tmp_path)
    theirs = their_model(tmp_path, torch.float32)
    prompt = torch.randint(2, config.vocab_size, (2, 10), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, use_cache=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    cache = LatentCache(config, batch=2, capacity=74)
    with torch.no_grad():
        ids, step = prompt, prompt
        for _ in range(64):
            step = ours(step, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, step), dim=1)
    assert torch.equal(ids, expected)


def test_the_other_rotary_layout_changes_logits_only_above_index_topk():
    """The silent error of public ports: half-split rotation in the indexer shows nothing up to `index_topk` tokens."""
    right, wrong = (
        random_model(tiny_config(index_topk=16, indexer_rope_interleave=interleaved), seed=5)
        for interleaved in (True, False)
    )
    ids = torch.randint(2, 97, (1, 80), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(right(ids[:, :16]).logits, wrong(ids[:, :16]).logits)
        assert relative(right(ids).logits, wrong(ids).logits) > 1e-2
