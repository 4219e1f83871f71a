"""What the engine takes of the machine: a cache of the size that was asked for, and no more than is free."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.engine import Engine, SamplingParams
from glm5.engine.admission import admit
from glm5.engine.memory import available_bytes
from glm5.errors import CheckpointError, InputError

GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


def bytes_per_token(config, size=4):
    """Of the cache, by the definition of its parts."""
    full = config.indexer_types.count("full")
    return size * (
        config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) + full * config.index_head_dim
    )


def test_what_can_never_fit_is_refused_with_the_numbers_before_work_starts():
    model = speaker_model()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    each = bytes_per_token(model.config)
    engine = Engine(model, memory_bytes=each * 140, block_size=10)
    needed, holds = (f"{each * tokens / 1e9:.3f} GB" for tokens in (141, 140))
    sentence = rf"needs 141 tokens of cache \({needed}\), but this engine's holds 140 \({holds}\).*memory_bytes"
    params = SamplingParams(n=3, max_tokens=42, stop_token_ids=list(range(64)), seed=1)
    with pytest.raises(InputError, match=sentence):
        engine.generate([[1], [1] * 100], [GREEDY, params])
    with pytest.raises(InputError, match=sentence):
        engine.stream([1] * 100, params)
    assert not calls
    # The last token needs no room. Three samples of this size take turns.
    (output,) = engine.generate([[1] * 100], replace(params, max_tokens=41, ignore_eos=True, stop_token_ids=()))
    assert [len(completion.token_ids) for completion in output.outputs] == [41] * 3
    (open_end,) = engine.generate([[1] * 100], replace(GREEDY, max_tokens=None))
    assert len(open_end.token_ids) == 41


def test_the_size_of_the_cache_is_what_is_asked_for_or_a_share_of_what_is_free(monkeypatch):
    model = speaker_model()
    each = bytes_per_token(model.config)
    total = lambda **settings: Engine(model, **settings).stats().blocks_total
    assert total(num_blocks=7) == 7
    assert total(memory_bytes=each * 64 * 3 + 5) == 3
    assert total() == 64 * 512 // 64  # all 64 sequences with their whole context
    monkeypatch.setattr("glm5.engine.backend.available_bytes", lambda device: each * 64 * 20)
    assert total() == 10
    with pytest.raises(InputError, match=r"21 block\(s\) of 64 tokens takes .* GB are there"):
        total(num_blocks=21)
    with pytest.raises(InputError, match=r"1 block\(s\) of 64 tokens"):
        total(memory_bytes=each)
    monkeypatch.setattr("glm5.engine.backend.available_bytes", lambda device: None)
    assert total(num_blocks=21) == 21


def test_the_published_limits_are_admitted_and_one_token_more_is_not():
    engine = Engine(glm5.GLM5(glm5.ModelConfig.from_preset("nano")))
    assert engine.max_model_len == 202_752 and engine.limits.cache_tokens >= 202_752
    context, new = [1] * (202_752 - 131_072), SamplingParams(max_tokens=131_072)
    check = lambda ids, params: admit(ids, params, engine.limits, eos_ids=frozenset(), tokenizer=None, grammars=None)
    assert check(context, new)[0].max_tokens == 131_072
    assert check([1] * 202_751, SamplingParams(max_tokens=None))[0].max_tokens == 1
    for ids, params in (([*context, 1], new), ([1] * 202_752, SamplingParams(max_tokens=1))):
        with pytest.raises(InputError, match="context limit is 202752"):
            check(ids, params)


def test_the_available_memory_is_read_from_the_system(monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes(torch.device("cpu")) <= total
    assert available_bytes(torch.device("meta")) is None
    meminfo = "MemTotal:  8000 kB\nMemFree:  1000 kB\nMemAvailable:  3000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self: meminfo)
    assert available_bytes(torch.device("cpu")) == 3000 * 1024
    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal:  8000 kB\n")
    assert available_bytes(torch.device("cpu")) == total


@pytest.mark.parametrize(("storage", "size"), [(None, 4), ("fp32", 4), ("bf16", 2)])
def test_the_cache_holds_the_weights_dtype_unless_another_storage_is_asked_for(storage, size):
    model = speaker_model()
    engine = Engine(model, storage=storage)
    assert engine.limits.bytes_per_token == bytes_per_token(model.config, size)
    assert len(engine.generate([[5, 6]], GREEDY)[0].token_ids) == 32
    assert Engine(speaker_model().bfloat16()).limits.bytes_per_token == bytes_per_token(model.config, 2)


def test_strict_mode_is_refused_without_fp32():
    with pytest.raises(InputError, match=r"Strict mode computes in fp32, .*torch\.bfloat16"):
        Engine(speaker_model().bfloat16(), strict=True)
    with pytest.raises(InputError, match="the cache is fp8"):
        Engine(speaker_model(), strict=True, storage="fp8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_no_token(value, temperature):
    model = speaker_model()
    with torch.no_grad():
        model.lm_head.weight[7, 0] = value
    with pytest.raises(CheckpointError, match=r"weights version 4\) gives NaN or infinite logits.*check_finite"):
        Engine(model, version=4).generate([[5]], SamplingParams(temperature=temperature))


def test_weights_that_overflow_the_models_dtype_are_refused():
    engine = Engine(speaker_model().bfloat16())
    state = {name: tensor.float() for name, tensor in engine.model.state_dict().items()}
    state["lm_head.weight"][0, 0] = torch.finfo(torch.float32).max  # finite, but infinity in bfloat16
    with pytest.raises(InputError, match="holds NaN or infinity"):
        engine.update_weights(1, state)
    assert engine.version == 0


def test_a_tokenizer_beyond_the_vocabulary_is_refused():
    model = speaker_model()
    model.config = replace(model.config, vocab_size=9, eos_token_id=None)
    with pytest.raises(InputError, match="ends a turn with id 9, but the model's vocabulary has 9"):
        Engine(model, speaker_tokenizer())


def test_generating_records_no_gradients_and_training_goes_on_afterwards():
    model = speaker_model()
    modes = []
    model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    Engine(model).generate([[5, 6, 7]], replace(GREEDY, max_tokens=4))
    assert modes == [True] * 4
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert not torch.is_inference_mode_enabled()
