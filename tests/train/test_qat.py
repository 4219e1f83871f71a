"""INT4 quantisation-aware training: the forward pass is that of the converted model, to the bit."""

import copy

import pytest
import torch
from small_runs import same

from glm5.checkpoint import load_model
from glm5.data import Loader, open_dataset
from glm5.errors import ConfigError
from glm5.model import GLM5, initialize_
from glm5.ops.quant import dequantize_int4, quantize_int4
from glm5.optim import OptimizerConfig
from glm5.train import LoopConfig, SFTConfig, sft
from glm5.train.losses import language_loss
from glm5.train.qat import full_weights, quantize_aware


@pytest.fixture
def model(tiny):
    model = GLM5(tiny[1])
    initialize_(model, 0.3, seed=1)
    return model


def converted(model: GLM5, names: tuple[str, ...], group: int) -> GLM5:
    """A plain model with the weights that offline conversion gives."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in names:
                parameter.copy_(dequantize_int4(*quantize_int4(parameter, group), torch.float32, group))
    return other


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("chosen", ["experts", "matrices"])
@pytest.mark.parametrize("group", [8, 32])
def test_the_forward_pass_is_that_of_the_converted_model(tiny, model, attention, chosen, group):
    plain = copy.deepcopy(model)
    names = quantize_aware(model, chosen, group)
    expected = converted(plain, names, group)
    ids = Loader(open_dataset(tiny[0] / "train"), rows=2, length=48, seed=0).batch(0).input_ids_BT
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, wanted = (m(ids, attention=attention, collect={"mtp"}) for m in (model, expected))
        assert torch.equal(found.logits, wanted.logits) and torch.equal(found.mtp_logits[0], wanted.mtp_logits[0])
    few = ids[:1, :4]
    with torch.no_grad():  # the way of a few tokens
        assert torch.equal(model(few).logits, expected(few).logits)
    assert not torch.equal(plain(ids).logits, expected(ids).logits)
    full_weights(model)
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_which_weights(model):
    experts = quantize_aware(model, "experts", 8)
    assert all(".experts." in name for name in experts) and len(experts) == 4  # one layer and the MTP module
    every = set(quantize_aware(model, "matrices", 8))
    left = {name for name, p in model.named_parameters() if p.ndim >= 2} - every
    words = ("embed_tokens", "lm_head", ".indexer.", "mlp.gate.weight", "eh_proj")
    assert left and all(any(word in name for word in words) for name in left)
    for word in words:
        assert any(word in name for name in left)


def test_the_gradient_is_that_at_the_converted_weights(tiny, model):
    batch = Loader(open_dataset(tiny[0] / "train"), rows=2, length=48, seed=0).batch(0)
    names = quantize_aware(model, "matrices", 8)
    expected = converted(model, names, 8)
    for module in expected.modules():  # the copy took the patched methods along
        for patched in ("forward", "effective_weight", "effective_weights"):
            module.__dict__.pop(patched, None)
    for m in (model, expected):
        language_loss(m, batch, attention="dense", mtp_weight=0.3, balance_weight=1.0).total.backward()
    assert same(*({name: p.grad for name, p in m.named_parameters()} for m in (model, expected)))


def test_sft_with_int4_learns_and_keeps_full_weights(tiny, straight, tmp_path):
    root, _ = tiny
    config = SFTConfig(
        parent=straight.path, train_data=root / "chat", heldout_data=root / "chat", heldout_documents=4, rows=4,
        length=64, int4="matrices", int4_group=8,
        loop=LoopConfig(steps=20, optimizer=OptimizerConfig(lr=3e-3), router_bias_rate=0.0),
    )  # fmt: skip
    run = sft(config, tmp_path / "int4")
    lines = run.read("metrics")
    assert lines[-1]["lm"] < 0.85 * lines[0]["lm"]
    weights = load_model(run.model_directory).model.layers[1].mlp.experts.down_proj
    assert not torch.equal(weights, dequantize_int4(*quantize_int4(weights, 8), torch.float32, 8))
    evaluation = (run.path / "evaluation.json").read_text()
    assert "the same weights, not quantised" in evaluation and "before SFT" in evaluation


def test_refusals(tiny):
    with pytest.raises(ConfigError, match=r"int4 is 'expert'; use .* Did you mean 'experts'"):
        SFTConfig(parent=tiny[0], train_data=tiny[0], int4="expert")
    with pytest.raises(ConfigError, match="int4_group is 1"):
        SFTConfig(parent=tiny[0], train_data=tiny[0], int4_group=1)
