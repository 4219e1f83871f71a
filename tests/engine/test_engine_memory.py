"""What the engine takes of the machine: a cache that grows and follows the weights' dtype, and no more than is free."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.engine.memory import available_bytes
from glm5.errors import CheckpointError, InputError
from glm5.model import LatentCache

GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


class SeenCache(LatentCache):
    """A cache that keeps a list of all caches with the capacities that each has had."""

    seen: list["SeenCache"]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.capacities = [self.capacity]
        if not next(iter(self.latents.values())).is_meta:
            self.seen.append(self)

    def grow(self, capacity):
        super().grow(capacity)
        self.capacities.append(self.capacity)


@pytest.fixture
def caches(monkeypatch):
    monkeypatch.setattr("glm5.engine.engine.LatentCache", SeenCache)
    monkeypatch.setattr(SeenCache, "seen", [], raising=False)
    return SeenCache.seen


def test_a_growing_cache_changes_no_token(monkeypatch, caches):
    engine = Engine(speaker_model())
    prompts = [[5, 6, 7], [8, 9, 10]]
    whole = engine.generate(prompts, GREEDY)
    monkeypatch.setattr("glm5.engine.engine.FIRST_ROOM", 2)
    grown = engine.generate(prompts, GREEDY)
    assert [cache.capacities for cache in caches] == [[35], [5, 10, 20, 35]]
    assert [output.token_ids for output in grown] == [output.token_ids for output in whole]
    assert [output.logprobs for output in grown] == [output.logprobs for output in whole]


def test_a_request_without_a_limit_does_not_take_the_whole_context_at_once(caches):
    engine = Engine(speaker_model())
    stop = engine.generate([[5]], GREEDY)[0].token_ids[4]
    engine.generate([[5]], replace(GREEDY, max_tokens=None, stop_token_ids=[stop]))
    assert caches[-1].capacities == [1 + 256]
    engine.generate([[5]], replace(GREEDY, max_tokens=None))
    assert caches[-1].capacities == [1 + 256, 512]


def test_what_cannot_fit_is_refused_with_the_numbers_before_work_starts(monkeypatch):
    model = speaker_model()
    config = model.config
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    full = config.indexer_types.count("full")
    latents = (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers
    needed = 3 * (100 + 400) * (latents + config.index_head_dim * full) * 4
    params = SamplingParams(n=3, max_tokens=400, stop_token_ids=list(range(64)), seed=1)
    engine = Engine(model)
    monkeypatch.setattr("glm5.engine.engine.available_bytes", lambda device: needed - 1)
    sentence = (
        rf"3 sequence\(s\) of up to 500 tokens need {needed / 1e9:.2f} GB .* {(needed - 1) / 1e9:.2f} GB are free"
    )
    with pytest.raises(InputError, match=sentence):
        engine.generate([[1], [1] * 100], [GREEDY, params])
    with pytest.raises(InputError, match=sentence):
        engine.stream([1] * 100, params)
    assert not calls
    for enough in (needed, None):
        monkeypatch.setattr("glm5.engine.engine.available_bytes", lambda device, enough=enough: enough)
        next(engine.stream([1] * 100, params))
    assert len(calls) == 2


def test_the_available_memory_is_read_from_the_system(monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes(torch.device("cpu")) <= total
    assert available_bytes(torch.device("meta")) is None
    meminfo = "MemTotal:  8000 kB\nMemFree:  1000 kB\nMemAvailable:  3000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self: meminfo)
    assert available_bytes(torch.device("cpu")) == 3000 * 1024
    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal:  8000 kB\n")
    assert available_bytes(torch.device("cpu")) == total


def test_the_cache_follows_the_dtype_of_the_weights(caches):
    engine = Engine(speaker_model().bfloat16())
    engine.generate([[5, 6]], GREEDY)
    engine.model.float()
    engine.generate([[5, 6]], GREEDY)
    dtypes = [{rows.dtype for rows in (*cache.latents.values(), *cache.keys.values())} for cache in caches]
    assert dtypes == [{torch.bfloat16}, {torch.float32}]


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
