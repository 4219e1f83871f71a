"""The decoder against the modules that it stands in for: every part, and every way around it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from decoding_steps import IDS, assert_like_the_modules, filled, modules_only, needs_extension
from tiny import tiny_model
from torch import Tensor

import glm5
from glm5.errors import InputError
from glm5.model import LatentCache, Replay, draft_layers, initialize_
from glm5.ops import decoding

pytestmark = pytest.mark.usefixtures("no_gradients")


# ---- the same numbers ----------------------------------------------------------------------------------------------
SHAPES = {
    "tiny": {},
    "shared indexer": {"indexer_types": ("full", "shared")},
    "half-split rotation": {"indexer_rope_interleave": False, "rope_interleave": False},
    "no shared expert, plain weights": {"n_shared_experts": 0, "norm_topk_prob": False},
    "two shared experts, one head": {"n_shared_experts": 2, "num_attention_heads": 1, "kv_lora_rank": 19},
    "dense layers only": {"first_k_dense_replace": 2, "index_n_heads": 20, "index_head_dim": 6},
    "nothing left out": {"index_topk": 64},
}


@needs_extension
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_steps_equal_the_modules(shape, attention, steps):
    model = tiny_model(1, **shape)
    for rows in (1, 3):
        caches = [LatentCache(model.config, batch=rows, capacity=40) for _ in range(2)]
        for i in range(40):
            token = IDS[:rows, i : i + 1]
            fast = model(token, cache=caches[0], attention=attention).logits
            with modules_only():
                slow = model(token, cache=caches[1], attention=attention).logits
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
        for name in ("latents", "keys"):
            for layer, kept in getattr(caches[0], name).items():
                torch.testing.assert_close(kept, getattr(caches[1], name)[layer], rtol=1e-4, atol=1e-4)
    assert len(steps) == 80


@needs_extension
def test_nano_decodes_like_the_modules_far_beyond_index_topk(steps):
    model = glm5.GLM5(glm5.ModelConfig.from_preset("nano")).eval()
    initialize_(model, 0.05, seed=0)
    ids = torch.randint(0, 4096, (1, 400), generator=torch.Generator().manual_seed(1))
    whole_TV = model(ids).logits[0, 350:]
    cache = LatentCache(model.config, batch=1, capacity=400)
    model(ids[:, :350], cache=cache)
    parts = [model(ids[:, i : i + 1], cache=cache).logits[0] for i in range(350, 400)]
    difference_T = (torch.cat(parts) - whole_TV).abs().amax(-1)
    # A near-tie between two keys or experts may fall either way in one token, for an honest reason.
    assert (difference_T < 1e-3).sum() >= 45 and len(steps) == 50


@needs_extension
def test_a_row_does_not_depend_on_the_other_rows():
    model = tiny_model(1)
    together = model(IDS[:, 30:31], cache=filled(model, 3)).logits
    cache = filled(model, 3)
    one = LatentCache(model.config, batch=1, capacity=45)
    one.latents = {layer: rows[1:2].contiguous() for layer, rows in cache.latents.items()}
    one.keys = {layer: rows[1:2].contiguous() for layer, rows in cache.keys.items()}
    one.length = 30
    assert torch.equal(model(IDS[1:2, 30:31], cache=one).logits, together[1:2])


@needs_extension
def test_cut_grown_and_forked_caches_between_steps():
    model = tiny_model(1)
    cache = filled(model)
    expected = model(IDS[:1, 30:31], cache=cache).logits
    model(IDS[:1, 31:32], cache=cache)
    fork = cache.fork()
    cache.truncate(30)
    cache.grow(80)
    model(IDS[1:2, 3:4], cache=fork)
    torch.testing.assert_close(model(IDS[:1, 30:31], cache=cache).logits, expected)
    assert (cache.length, fork.length) == (31, 33)


# ---- ways around it ------------------------------------------------------------------------------------------------
def by_the_modules(**arguments: object) -> Callable[[glm5.GLM5, LatentCache, Tensor], object]:
    return lambda model, cache, ids: model(ids, cache=cache, **arguments)


def under_autocast(model: glm5.GLM5, cache: LatentCache, ids: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16), contextlib.suppress(InputError):
        model(ids, cache=cache)


def with_gradients(model: glm5.GLM5, cache: LatentCache, ids: Tensor) -> None:
    with torch.enable_grad():
        assert model(ids, cache=cache).logits.requires_grad


WAYS_AROUND = {
    "positions": by_the_modules(positions_BT=torch.tensor([[90]])),
    "segments": by_the_modules(segment_ids_BT=torch.tensor([[3]])),
    "collect": by_the_modules(collect={"hidden"}),
    "replay": by_the_modules(replay=Replay(experts={1: torch.tensor([[[0, 1]]])})),
    "autocast": under_autocast,
    "gradients": with_gradients,
    "two tokens": lambda model, cache, ids: model(ids.repeat(1, 2), cache=cache),
    "no cache": lambda model, cache, ids: model(ids),
}


@pytest.mark.parametrize("way", WAYS_AROUND.values(), ids=WAYS_AROUND)
def test_what_the_decoder_does_not_know_is_left_to_the_modules(way, steps):
    model = tiny_model(1)
    way(model, filled(model), IDS[:1, 30:31])
    assert not steps


def test_packed_rows_other_dtypes_and_grouped_routers_are_left_to_the_modules(steps):
    model = tiny_model(1)
    cache = LatentCache(model.config, batch=1, capacity=45)
    model(IDS[:1, :30], cache=cache, segment_ids_BT=torch.tensor([[-1] * 5 + [0] * 25]))
    model(IDS[:1, 30:31], cache=cache)
    for other in (model.bfloat16(), tiny_model(1, dtype=torch.float64), tiny_model(1, n_group=2, topk_group=1)):
        other(IDS[:1, 30:31], cache=filled(other))
    assert not steps


def test_without_the_extension_the_modules_run(monkeypatch, steps):
    model = tiny_model(1)
    monkeypatch.setattr(decoding, "_decoding", None)
    assert_like_the_modules(model)
    assert not steps


def test_a_cache_that_does_not_fit_is_refused_as_by_the_modules():
    model = tiny_model(1)
    with pytest.raises(InputError, match="The cache is full"):
        model(IDS[:1, :1], cache=LatentCache(model.config, batch=1, capacity=0))
    with pytest.raises(InputError, match="holds 2 row"):
        model(IDS[:1, :1], cache=LatentCache(model.config, batch=2, capacity=3))
    with pytest.raises(InputError, match="no rows for layer 0"):
        model(IDS[:1, :1], cache=LatentCache(model.config, batch=1, capacity=3, layers=draft_layers(model.config)))
    with pytest.raises(InputError, match="no rows for layer 1"):
        model(IDS[:1, :1], cache=LatentCache(model.config, batch=1, capacity=3, layers=[0]))
    with pytest.raises(InputError, match="outside the vocabulary"):
        model(IDS[:1, :1] + 97, cache=LatentCache(model.config, batch=1, capacity=3))


def test_threads_take_turns():
    model = tiny_model(1)
    caches = [filled(model) for _ in range(4)]
    expected = [model(IDS[:1, i : i + 1], cache=caches[0]).logits for i in range(30, 40)]
    found: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def decode(who: int) -> None:
        found[who] = [model(IDS[:1, i : i + 1], cache=caches[who]).logits for i in range(30, 40)]

    threads = [threading.Thread(target=decode, args=(who,)) for who in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for who in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(found[who], expected, strict=True))
