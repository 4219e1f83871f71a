"""Adapters: what learns, what stays to the bit, and how the engines take it."""

import copy

import pytest
import torch
from learning import at_version, copies, engine_batch, moved
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.engine.strict import packed_strict_logprobs
from glm5.errors import ConfigError
from glm5.model.int4 import Int4Experts, Int4Linear, quantize_base
from glm5.ops.quant import dequantize_int4, quantize_int4
from glm5.rl.adapters import LoRA, adapter_tensors, check_targets, merged_weights, without_adapters
from glm5.rl.aids import Aids
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.reference import KL
from glm5.rl.retention import Retention


@pytest.fixture(scope="module")
def batch():
    return engine_batch()


TARGETS = ("*.q_b_proj", "*.kv_b_proj", "*.o_proj", "*.experts")


@pytest.mark.parametrize("base", ["full", "int4"])
def test_lora_leaves_the_base_untouched_to_the_bit(batch, base):
    config = LearnerConfig(lora=LoRA(targets=TARGETS, base=base), kl=KL())
    learner = Learner(speaker_model(), config)
    everything = copies(learner.model.state_dict())
    assert learner.step(batch)["kl"] == pytest.approx(0, abs=1e-6)
    assert learner.step(at_version(batch, 1))["kl"] > 0  # the base is the reference
    changed = moved(everything, learner.model.state_dict())
    assert changed and all("lora_" in name for name in changed)
    assert learner.weights().keys() == adapter_tensors(learner.model).keys() >= changed
    fresh = speaker_model()
    if base == "full":
        assert all(torch.equal(t, learner.model.state_dict()[n]) for n, t in fresh.state_dict().items())
    quantized = speaker_model()
    quantize_base(quantized)
    with without_adapters(learner.model):
        ids = torch.arange(12)[None]
        torch.testing.assert_close(
            learner.model(ids).logits, (quantized if base == "int4" else fresh)(ids).logits, rtol=0, atol=0
        )


@pytest.mark.parametrize("base", ["full", "int4"])
def test_engines_take_adapters_or_the_merged_model(batch, base):
    learner = Learner(speaker_model(), LearnerConfig(lora=LoRA(targets=TARGETS, base=base)))
    adapted = Engine(copy.deepcopy(learner.model), speaker_tokenizer())
    plain = Engine(speaker_model(), speaker_tokenizer())
    for version in range(4):
        learner.step(at_version(batch, version))
    adapted.update_weights(4, learner.weights())
    plain.update_weights(4, merged_weights(learner.model))
    assert merged_weights(learner.model).keys() == speaker_model().state_dict().keys()
    prompts, params = [[5, 6, 7], [8, 9]], SamplingParams(max_tokens=6, seed=3)
    trajectory = []
    for engine in (adapted, plain):
        outputs = engine.generate(prompts, params)
        assert outputs[0].outputs[0].versions[0] == 4
        trajectory.append([x for output in outputs for x in output.outputs[0].logprobs])
    torch.testing.assert_close(*map(torch.tensor, trajectory), atol=1e-4, rtol=0)
    first = Engine(copy.deepcopy(speaker_model()), speaker_tokenizer()).generate(prompts, params)
    assert [x for output in first for x in output.outputs[0].logprobs] != trajectory[1]


def test_a_packed_weight_has_the_gradient_of_its_whole_form():
    model = speaker_model()
    name = next(n for n in quantize_base(model) if n.endswith("o_proj"))
    module = model.get_submodule(name)
    original = speaker_model().get_submodule(name).weight
    weight = dequantize_int4(*quantize_int4(original), torch.float32)
    assert isinstance(module, Int4Linear) and torch.equal(module.effective_weight(), weight)
    inputs = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    ours, theirs = (inputs.clone().requires_grad_() for _ in range(2))
    module(ours).square().sum().backward()
    torch.nn.functional.linear(theirs, weight).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    bits = 8 * sum(t.numel() * t.element_size() for t in module.state_dict().values()) / weight.numel()
    assert bits <= 4 + 16 / 24  # a scale for a last group of 24 inputs


def test_an_engine_over_int4_holds_the_rounded_weights_whole(batch):
    """It says the same to the bit, and does not unpack its weights at each token."""
    learner = Learner(speaker_model(), LearnerConfig(lora=LoRA(targets=TARGETS, base="int4")))
    learner.step(batch)
    theirs = learner.engine_model()
    assert not any(isinstance(module, Int4Linear | Int4Experts) for module in theirs.modules())
    assert adapter_tensors(theirs).keys() == learner.weights().keys()
    assert any(isinstance(module, Int4Experts) for module in learner.model.modules())
    rows = [[*range(3, 40)], [5, 6, 7, 8]]
    for ours_T, theirs_T in zip(*(packed_strict_logprobs(m, rows) for m in (learner.model, theirs)), strict=True):
        assert torch.equal(ours_T, theirs_T)


def test_each_pattern_of_the_targets_names_something():
    check_targets(speaker_model(), LoRA(targets=TARGETS))
    with pytest.raises(ConfigError, match=r"no linear or expert weight is called '\*\.expert'; one is 'model\.layers"):
        check_targets(speaker_model(), LoRA(targets=("*.o_proj", "*.expert")))


def test_what_is_measured_holds_the_rounded_weights_whole_too():
    """An engine over packed weights, as the skills suite has one, would unpack them at each token."""
    seen = []
    retention = Retention((lambda model: seen.append(model) or {"norm": model.lm_head.weight.norm().item()},), every=2)
    learner = Learner(speaker_model(), LearnerConfig(lora=LoRA(base="int4")), aids=Aids(retention=retention))
    assert (
        learner.measured(1) == {} and learner.measured(2).keys() == {"retention/norm"} == learner.measured(None).keys()
    )
    assert len(seen) == 2 and all(model.state_dict().keys() == speaker_model().state_dict().keys() for model in seen)
