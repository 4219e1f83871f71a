"""Invariants of the forward pass: caches, packing, padding, replay, adapters, and inputs that are refused."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config, tiny_model

import glm5
from glm5.errors import GLM5Error, InputError
from glm5.model import LatentCache, Replay, add_adapters, draft_layers, merge_adapters, transformer
from glm5.ops import attention, selection

IDS = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("pattern", [("full", "full"), ("full", "shared")])
@pytest.mark.parametrize("chunks", [[1] * 60, [25, 1, 34], [7] * 8 + [4]])
def test_cached_decode_and_chunked_prefill_equal_one_pass(chunks, pattern):
    model = tiny_model(1, indexer_types=pattern)
    whole = model(IDS).logits
    cache = LatentCache(model.config, batch=2, capacity=60)
    parts = [model(part, cache=cache).logits for part in IDS.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 60


@pytest.mark.parametrize("keep", [0, 1, 25])
def test_a_long_prefill_in_chunks_equals_one_pass(monkeypatch, keep):
    model = tiny_model(1)
    segments = torch.tensor([[0] * 35 + [3] * 25, [-1] * 10 + [0] * 50])
    whole = model(IDS, segment_ids_BT=segments, logits_to_keep=keep).logits
    cache = LatentCache(model.config, batch=2, capacity=60)
    monkeypatch.setattr(transformer, "CHUNK", 13)
    for given in (None, cache):
        chunked = model(IDS, segment_ids_BT=segments, cache=given, logits_to_keep=keep).logits
        assert chunked.shape == whole.shape
        real = (segments >= 0)[:, -whole.shape[1] :]
        torch.testing.assert_close(chunked[real], whole[real], rtol=1e-4, atol=1e-4)
    assert cache.length == 60


def test_an_interrupted_long_prefill_leaves_the_cache_as_it_was(monkeypatch):
    model = tiny_model(1)
    cache = LatentCache(model.config, batch=2, capacity=60)
    model(IDS[:, :10], cache=cache)
    monkeypatch.setattr(transformer, "CHUNK", 13)
    select, calls = selection.select, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return select(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(selection, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, 10:], cache=cache)
    assert cache.length == 10


def test_a_cut_cache_and_a_forked_cache_go_on_like_new_ones():
    model = tiny_model(1)
    segments = torch.tensor([[-1] * 9 + [6] * 31, [0] * 15 + [4] * 25])
    cache = LatentCache(model.config, batch=2, capacity=45)
    model(IDS[:, :40], segment_ids_BT=segments, cache=cache)
    fork = cache.fork()
    # The fork writes a wrong draft over the rows that the original goes on with, and the other way round.
    wrong = IDS[:, 40:45].flip(1)
    model(wrong, cache=fork)
    cache.grow(60)
    whole = torch.cat((segments, segments[:, -1:].expand(2, 20)), 1)
    expected = model(IDS, segment_ids_BT=whole).logits[:, 40:]
    torch.testing.assert_close(model(IDS[:, 40:], cache=cache).logits, expected, rtol=1e-4, atol=1e-4)
    fork.truncate(40)
    fork.grow(60)
    torch.testing.assert_close(model(IDS[:, 40:], cache=fork).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_fork_keeps_what_it_wrote():
    model = tiny_model(1)
    cache = LatentCache(model.config, batch=2, capacity=60)
    model(IDS[:, :40], cache=cache)
    fork = cache.fork()
    model(IDS[:, 40:50], cache=fork)
    model(IDS[:, 40:50].flip(1), cache=cache)
    torch.testing.assert_close(model(IDS[:, 50:], cache=fork).logits, model(IDS).logits[:, 50:], rtol=1e-4, atol=1e-4)


def test_an_emptied_cache_forgets_its_segments():
    model = tiny_model(1)
    cache = LatentCache(model.config, batch=2, capacity=60)
    model(IDS[:, :40], segment_ids_BT=torch.tensor([[-1] * 20 + [0] * 20] * 2), cache=cache)
    cache.truncate(0)
    torch.testing.assert_close(model(IDS, cache=cache).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_packed_documents_equal_documents_alone():
    model = tiny_model(1)
    segments = torch.tensor([[4] * 25 + [2] * 30 + [-1] * 5, [0] * 60])
    packed = model(IDS, segment_ids_BT=segments, collect={"mtp", "router", "indexer_kl"})
    for row, start, end in ((0, 0, 25), (0, 25, 55), (1, 0, 60)):
        alone = model(IDS[row : row + 1, start:end], collect={"mtp"})
        torch.testing.assert_close(packed.logits[row, start:end], alone.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            packed.mtp_logits[0][row, start : end - 1], alone.mtp_logits[0][0, :-1], rtol=1e-4, atol=1e-4
        )
    assert int(packed.router[0].load_E.sum()) == 2 * (25 + 30 + 60)  # two experts per real token
    changed = IDS.clone()
    changed[0, 55:] = 1  # the padding's content reaches nothing
    again = model(changed, segment_ids_BT=segments, collect={"router", "indexer_kl"})
    torch.testing.assert_close(again.logits[0, :55], packed.logits[0, :55])
    torch.testing.assert_close(again.router[0].balance, packed.router[0].balance)
    torch.testing.assert_close(again.indexer_kl[0], packed.indexer_kl[0])


def test_left_padded_rows_decode_like_rows_alone():
    model = tiny_model(1)
    segments = torch.tensor([[-1] * 20 + [5] * 20, [0] * 10 + [3] * 30])
    cache = LatentCache(model.config, batch=2, capacity=60)
    parts = [model(IDS[:, :40], segment_ids_BT=segments, cache=cache).logits]
    parts += [model(IDS[:, i : i + 1], cache=cache).logits for i in range(40, 60)]
    logits = torch.cat(parts, 1)
    torch.testing.assert_close(logits[0, 20:], model(IDS[:1, 20:]).logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, 10:], model(IDS[1:, 10:]).logits[0], rtol=1e-4, atol=1e-4)


def test_sparse_is_dense_up_to_index_topk_and_not_beyond():
    model = tiny_model(1)
    topk = model.config.index_topk
    assert torch.equal(model(IDS[:, :topk]).logits, model(IDS[:, :topk], attention="dense").logits)
    sparse, dense = model(IDS).logits, model(IDS, attention="dense").logits
    torch.testing.assert_close(sparse[:, :topk], dense[:, :topk], rtol=1e-4, atol=1e-4)
    assert (sparse[:, topk + 5 :] - dense[:, topk + 5 :]).abs().max() > 1e-2


def test_only_selected_latents_are_read(monkeypatch):
    """Poisons every latent outside the selection: sparse attention must not see the poison."""
    model = tiny_model(1, num_hidden_layers=1, first_k_dense_replace=0)
    kept = model(IDS[:1], collect={"selection"})
    chosen = kept.selection[0][0, -1]
    original = attention.sparse_attention

    def poisoned(q, latents, selected, *rest):
        mask = torch.ones(latents.shape[1], dtype=torch.bool)
        mask[selected[0, -1]] = False
        latents = latents.masked_fill(mask[None, :, None], 1e9)
        return original(q[:, -1:], latents, selected[:, -1:], *rest).expand(-1, q.shape[1], -1, -1)

    monkeypatch.setattr(attention, "sparse_attention", poisoned)
    torch.testing.assert_close(model(IDS[:1]).logits[0, -1], kept.logits[0, -1])
    assert len(set(chosen.tolist())) == model.config.index_topk


def test_layers_that_share_an_indexer_select_alike():
    out = tiny_model(1, indexer_types=("full", "shared"))(IDS, collect={"selection", "indexer_kl"})
    assert torch.equal(out.selection[0], out.selection[1])
    assert list(out.indexer_kl) == [0]
    own = tiny_model(1)(IDS, collect={"selection"})
    assert not torch.equal(own.selection[0], own.selection[1])


def test_an_indexer_whose_scores_are_no_numbers_selects_nothing_and_breaks_nothing():
    """Damaged weights are found by `load_model(check_finite=True)`; a pass over them must not end in a bad index."""
    model = tiny_model(1)
    model.model.layers[0].self_attn.indexer.wk.weight[0, 0] = torch.nan
    cache = LatentCache(model.config, batch=2, capacity=60)
    model(IDS[:, :40], cache=cache)
    assert model(IDS[:, 40:41], cache=cache).logits.shape == (2, 1, 97)


def test_replay_reproduces_and_overrides():
    model = tiny_model(1)
    out = model(IDS, collect={"selection", "router"})
    replay = Replay(experts={r.layer: r.experts_BTK for r in out.router}, positions=out.selection)
    torch.testing.assert_close(model(IDS, replay=replay).logits, out.logits)
    other = Replay(experts={1: (out.router[0].experts_BTK + 1) % 8})
    changed = model(IDS, replay=other, collect={"router"})
    assert torch.equal(changed.router[0].experts_BTK, other.experts[1])
    assert (changed.logits - out.logits).abs().max() > 1e-3


def test_drafts_from_one_module_equal_the_training_form():
    """Step by step with `draft` as an engine runs it, against `collect={"mtp"}` as training runs it."""
    model = tiny_model(1)
    model.mtp_steps = 3
    out = model(IDS, collect={"hidden", "mtp"})
    assert len(out.mtp_logits) == 3
    hidden = out.hidden
    for step in range(3):
        following = torch.cat((IDS[:, step + 1 :], torch.zeros(2, step + 1, dtype=torch.int64)), 1)
        hidden, logits = model.draft(hidden, following, step=step)
        torch.testing.assert_close(logits, out.mtp_logits[step])
    cache = LatentCache(model.config, batch=2, capacity=60, layers=draft_layers(model.config))
    by_token = [model.draft(out.hidden[:, i : i + 1], IDS[:, i + 1 : i + 2], cache=cache)[1] for i in range(59)]
    torch.testing.assert_close(torch.cat(by_token, 1), out.mtp_logits[0][:, :59], rtol=1e-4, atol=1e-4)


def test_mtp_reads_the_state_that_the_config_names():
    after, before = tiny_model(1), tiny_model(1, mtp_hidden="before_norm")
    for model in (after, before):  # a norm of ones would vanish inside the norm that MTP applies itself
        model.model.norm.weight.copy_(torch.linspace(0.5, 2.0, 32))
    normed = after(IDS, collect={"hidden"}).hidden
    raw = before(IDS, collect={"hidden"}).hidden
    torch.testing.assert_close(after.model.norm(raw), normed)
    assert (after(IDS, collect={"mtp"}).mtp_logits[0] - before(IDS, collect={"mtp"}).mtp_logits[0]).abs().max() > 1e-3


def test_merged_adapters_equal_adapters():
    model = tiny_model(1)
    base = model(IDS).logits
    add_adapters(model, rank=3, targets=("*.q_b_proj", "*.kv_b_proj", "*.experts", "lm_head"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    adapted = model(IDS).logits
    assert (adapted - base).abs().max() > 1e-2
    merge_adapters(model)
    assert not any("lora_" in name for name in model.state_dict())
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-4, atol=1e-4)


def test_logits_to_keep_and_given_positions():
    model = tiny_model(1)
    whole = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, whole[:, -3:])
    shifted = model(IDS, positions_BT=torch.arange(100, 160).expand(2, -1)).logits
    torch.testing.assert_close(shifted, whole, rtol=1e-3, atol=1e-3)  # rotary positions are relative
    stretched = model(IDS, positions_BT=(torch.arange(60) * 3).expand(2, -1)).logits
    assert (stretched - whole).abs().max() > 1e-2


def test_bf16_stays_near_fp32():
    wide = tiny_model(1, std=0.1)
    narrow = glm5.GLM5(wide.config, dtype=torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    a = wide(IDS[:, :8], collect={"router"})
    replay = Replay(experts={r.layer: r.experts_BTK for r in a.router})  # rounding may flip a choice of experts
    b = narrow(IDS[:, :8], replay=replay).logits.float()
    assert (a.logits - b).abs().max() / a.logits.abs().max() < 0.05


# ---- inputs that are refused ----------------------------------------------------------------------------------------
def bad(**changes: object) -> dict[str, object]:
    return {"input_ids_BT": IDS, **changes}


BAD_INPUTS = [
    (bad(input_ids_BT=IDS[0]), "give int64 token ids [batch, tokens]"),
    (bad(input_ids_BT=IDS.float()), "give int64 token ids"),
    (bad(input_ids_BT=IDS[:, :0]), "at least one of each"),
    (bad(input_ids_BT=IDS + 50), "outside the vocabulary of 97"),
    (bad(input_ids_BT=IDS - 50), "outside the vocabulary"),
    (bad(input_ids_BT=torch.zeros(1, 5000, dtype=torch.int64)), "Shorten the input"),
    (bad(positions_BT=IDS[:, 1:]), "positions have shape [2, 59]"),
    (bad(segment_ids_BT=IDS[:1]), "segment_ids have shape [1, 60]"),
    (bad(segment_ids_BT=torch.tensor([[0, 1] * 30] * 2)), "one id for two separate runs"),
    (bad(attention="spars"), "Did you mean 'sparse'"),
    (bad(collect={"routers"}), "Did you mean 'router'"),
    (bad(logits_to_keep=-1), "logits_to_keep is -1"),
    (bad(cache=lambda c: LatentCache(c, batch=3, capacity=60)), "The cache holds 3 row(s)"),
    (bad(cache=lambda c: LatentCache(c, batch=2, capacity=10)), "The cache is full"),
    (bad(cache=lambda c: LatentCache(c, batch=2, capacity=9999)), "exceeds the model's 4,096 positions"),
    (bad(cache=lambda c: LatentCache(c, batch=2, capacity=60), collect={"mtp"}), "collect={'mtp'} is for training"),
    (bad(cache=lambda c: LatentCache(c, batch=2, capacity=60, dtype=torch.bfloat16)), "make the cache with dtype"),
    (bad(cache=lambda c: LatentCache(c, batch=2, capacity=60, layers=draft_layers(c))), "no rows for layer 0"),
    (bad(replay=Replay(experts={1: torch.full((2, 60, 2), 77)})), "names an expert outside 0 to 7"),
    (bad(replay=Replay(experts={9: torch.zeros(2, 60, 2, dtype=torch.int64)})), "names layer 9"),
    (bad(replay=Replay(experts={1: torch.zeros(2, 9, 2, dtype=torch.int64)})), "of shape [2, 9, 2]; give int64"),
    (bad(replay=Replay(positions={0: torch.full((2, 60, 8), 59)})), "a position that its query may not see"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_INPUTS, ids=[s[:30] for _, s in BAD_INPUTS])
def test_bad_inputs_are_refused_with_a_sentence(arguments, sentence):
    model = tiny_model(1)
    with pytest.raises(GLM5Error) as caught:
        call_with_cache(model, arguments)
    assert sentence in str(caught.value)


def call_with_cache(model: glm5.GLM5, arguments: dict[str, object]) -> None:
    make = arguments.get("cache")
    model(**arguments | ({"cache": make(model.config)} if callable(make) else {}))


def test_a_model_without_mtp_says_so():
    model = glm5.GLM5(tiny_config(num_nextn_predict_layers=0))
    with pytest.raises(InputError, match="no MTP module"):
        model(IDS, collect={"mtp"})
    with pytest.raises(InputError, match="no MTP module"):
        model.draft(torch.zeros(1, 1, 32), IDS[:1, :1])


@pytest.mark.parametrize(
    ("hidden", "ids", "attention", "sentence"),
    [
        (torch.zeros(1, 1, 31), IDS[:1, :1], "sparse", "give one state of 32 values per id"),
        (torch.zeros(1, 1, 32), IDS[:1, :1] + 97, "sparse", "outside the vocabulary"),
        (torch.zeros(1, 1, 32), IDS[:1, :1], "spars", "Did you mean 'sparse'"),
    ],
)
def test_bad_drafts_are_refused(hidden, ids, attention, sentence):
    with pytest.raises(InputError) as caught:
        tiny_model(1).draft(hidden, ids, attention=attention)
    assert sentence in str(caught.value)


def test_bad_adapters_are_refused():
    with pytest.raises(InputError, match="rank is 0"):
        add_adapters(tiny_model(1), rank=0)
    adapted = tiny_model(1)
    add_adapters(adapted)
    with pytest.raises(InputError, match="has adapters already"):
        add_adapters(adapted)
    with pytest.raises(InputError, match="No linear or expert weight matches"):
        add_adapters(tiny_model(1), targets=("*.nothing",))


def test_a_failed_pass_leaves_the_cache_as_it_was(monkeypatch):
    model = tiny_model(1)
    cache = LatentCache(model.config, batch=2, capacity=60)
    model(IDS[:, :30], cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(selection, "select", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, 30:40], cache=cache)
    assert cache.length == 30
    after = model(IDS[:, 30:], cache=cache).logits
    torch.testing.assert_close(after, model(IDS).logits[:, 30:], rtol=1e-4, atol=1e-4)
