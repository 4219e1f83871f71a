"""Every change of a model is seen by the decoder at its next step."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from decoding_steps import IDS, assert_like_the_modules, filled, modules_only, needs_extension
from tiny import tiny_model
from torch import Tensor, nn

import glm5
from glm5.model import LatentCache, add_adapters, merge_adapters
from glm5.ops.linear import Linear
from glm5.optim import OptimizerConfig, build_optimizers
from glm5.train.qat import full_weights, quantize_aware

pytestmark = pytest.mark.usefixtures("no_gradients")


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
