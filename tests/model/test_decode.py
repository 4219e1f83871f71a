"""The decoder against the modules that it stands in for: every part, every change of weights, every way around it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

import glm5
from glm5.errors import InputError
from glm5.model import LatentCache, Replay, add_adapters, draft_layers, initialize_, merge_adapters
from glm5.model.decode import Decoder, FastSteps
from glm5.ops import decoding
from glm5.ops.linear import Linear
from glm5.optim import OptimizerConfig, build_optimizers
from glm5.train.qat import full_weights, quantize_aware

IDS = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(5))

needs_extension = pytest.mark.skipif(not decoding.available(), reason="the install found no C compiler")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextlib.contextmanager
def modules_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastSteps, "logits", lambda *arguments: None)
        yield


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per step that a decoder ran."""
    done: list[int] = []
    step = Decoder.step

    def counted(self: Decoder, ids: list[int], *rest: object) -> Tensor:
        done.append(len(ids))
        return step(self, ids, *rest)

    monkeypatch.setattr(Decoder, "step", counted)
    return done


def filled(model: glm5.GLM5, rows: int = 1, tokens: int = 30) -> LatentCache:
    """A cache of the first tokens, by the modules."""
    dtype = model.lm_head.weight.dtype
    cache = LatentCache(model.config, batch=rows, capacity=45, dtype=dtype)
    if tokens:
        with modules_only():
            model(IDS[:rows, :tokens], cache=cache)
    return cache


def assert_like_the_modules(model: glm5.GLM5) -> Tensor:
    """The logits of the next token, which are the modules'."""
    fast = model(IDS[:1, 30:31], cache=filled(model)).logits
    with modules_only():
        slow = model(IDS[:1, 30:31], cache=filled(model)).logits
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    return fast


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


# ---- changes of the weights ----------------------------------------------------------------------------------------
@needs_extension
def test_every_weight_is_read_where_it_lies(steps):
    """Each changed in place, after a decoder was made; `.data` leaves no trace that PyTorch could be asked for."""
    model = tiny_model(1)
    before = assert_like_the_modules(model)
    decoder = model._fast_steps._decoder
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("mtp."):
            continue
        kept = tensor.clone()
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
        tensor.data.mul_(-1.5).add_(0.3 * noise)
        after = assert_like_the_modules(model)
        assert (after - before).abs().max() > 1e-5, name
        tensor.data.copy_(kept)
    assert model._fast_steps._decoder is decoder and len(steps) > 30
    assert torch.equal(assert_like_the_modules(model), before)


def train_step(model: glm5.GLM5, name: str) -> None:
    with torch.enable_grad():
        model(IDS).logits.square().mean().backward()
    for optimizer in build_optimizers(model, model.config, OptimizerConfig(name=name, lr=0.1)):
        optimizer.step()


def in_bulk(model: glm5.GLM5) -> None:
    model.load_state_dict(tiny_model(2).state_dict())


def assigned(model: glm5.GLM5) -> None:
    model.load_state_dict(tiny_model(2).state_dict(), assign=True)


def moved(model: glm5.GLM5) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def replaced(model: glm5.GLM5) -> None:
    model.model.layers[0].self_attn.q_b_proj.weight = nn.Parameter(torch.randn(24, 24))


def another_layer(model: glm5.GLM5) -> None:
    model.model.layers[1] = tiny_model(2).model.layers[1]


def adamw(model: glm5.GLM5) -> None:
    train_step(model, "adamw")


def muon(model: glm5.GLM5) -> None:
    train_step(model, "muon")


def adapted(model: glm5.GLM5) -> None:
    add_adapters(model, rank=2, targets=("*.kv_b_proj", "*.experts", "lm_head"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))


def merged(model: glm5.GLM5) -> None:
    adapted(model)
    assert_like_the_modules(model)
    merge_adapters(model)


def quantised(model: glm5.GLM5) -> None:
    quantize_aware(model, "matrices", 8)


def quantised_experts(model: glm5.GLM5) -> None:
    quantize_aware(model, "experts", 8)


def hooked(model: glm5.GLM5) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: (out[0] * 2, *out[1:]))


def prepared(model: glm5.GLM5) -> None:
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def another_forward(model: glm5.GLM5) -> None:
    norm = model.model.norm
    norm.forward = lambda x: type(norm).forward(norm, x) * 2


class Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def another_class(model: glm5.GLM5) -> None:
    model.model.layers[0].mlp.down_proj.__class__ = Doubled


def another_epsilon(model: glm5.GLM5) -> None:
    model.model.norm.eps = 10.0


def another_config(model: glm5.GLM5) -> None:
    model.config = dataclasses.replace(model.config, index_topk=4)
    for layer in model.model.layers:
        layer.self_attn.config = model.config


def seen_otherwise(model: glm5.GLM5) -> None:
    """The same address, other strides."""
    weight = model.model.norm.weight
    with torch.no_grad():
        weight[0] = 3.0
    weight.data = weight.data.as_strided(weight.shape, (0,))


CHANGES = [seen_otherwise, in_bulk, assigned, moved, replaced, another_layer, adamw, muon, adapted, merged, quantised,
           quantised_experts, hooked, prepared, another_forward, another_class, another_epsilon,
           another_config]  # fmt: skip


@needs_extension
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_model_is_seen_by_the_next_step(change):
    model = tiny_model(1)
    before = assert_like_the_modules(model)
    assert model._fast_steps._decoder is not None
    change(model)
    after = assert_like_the_modules(model)
    assert (after - before).abs().max() > 1e-4


@needs_extension
def test_a_model_that_became_another_is_left_alone():
    """Nothing of the old weights is kept, and one more layer is not overlooked."""
    model = tiny_model(1)
    assert_like_the_modules(model)
    cache = filled(model)
    model.model.layers.append(torch.nn.Identity())
    assert not model._fast_steps._decoder.current(model.config)
    assert model._fast_steps.logits(model, model.config, IDS[:1, 30:31], cache, True) is None
    assert model._fast_steps._decoder is None


@needs_extension
def test_a_cache_that_once_had_padding_starts_anew(steps):
    model = tiny_model(1)
    cache = LatentCache(model.config, batch=1, capacity=8)
    model(IDS[:1, :3], segment_ids_BT=torch.tensor([[-1, 0, 0]]), cache=cache)
    cache.truncate(0)
    fresh = LatentCache(model.config, batch=1, capacity=8)
    for i in range(3):
        fast = model(IDS[:1, i : i + 1], cache=cache).logits
        with modules_only():
            slow = model(IDS[:1, i : i + 1], cache=fresh).logits
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    assert len(steps) == 3


@needs_extension
def test_a_model_without_adapters_quantisation_or_hooks_decodes_fast_again(steps):
    model = tiny_model(1)
    adapted(model)
    assert_like_the_modules(model)
    quantize_aware(model, "experts", 8)
    handle = model.model.layers[1].register_forward_hook(lambda *arguments: None)
    assert not steps
    merge_adapters(model), full_weights(model), handle.remove()
    assert_like_the_modules(model)
    assert steps == [1]


@needs_extension
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_reads_its_own_weights(copied):
    model = tiny_model(1)
    before = assert_like_the_modules(model)
    twin = copied(model)
    for parameter in twin.parameters():
        parameter.mul_(1.3)
    assert (assert_like_the_modules(twin) - before).abs().max() > 1e-3
    assert torch.equal(assert_like_the_modules(model), before)


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
