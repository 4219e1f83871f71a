"""Strict mode: a token's numbers do not depend on its company, to the bit, and are the trainer's."""

from __future__ import annotations

import pytest
import torch
from decoding_steps import needs_extension
from paged import Tokens, feed, scattered
from tiny import tiny_model
from torch import Tensor

import glm5
from glm5.engine.paged_cache import PagedCache
from glm5.engine.runner import Runner
from glm5.engine.sampler import token_logprobs
from glm5.engine.strict import strict_logprobs
from glm5.errors import InputError
from glm5.model import add_adapters, initialize_
from glm5.model.fast_steps import FastSteps

IDS = torch.randint(0, 97, (7, 150), generator=torch.Generator().manual_seed(5)).tolist()
LENGTHS = 150, 5, 66, 120, 9, 31, 80
"""index_topk is 8: contexts below and above it stand side by side."""


@pytest.fixture(params=[pytest.param(True, marks=needs_extension), False], ids=["decoder", "modules"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether decoders run, or the modules alone: one token at a time, which is slow."""
    if not request.param:
        monkeypatch.setattr(FastSteps, "exact_decoder", lambda *arguments: None)
    return request.param


def sequences(model: glm5.GLM5, rows: int, length: int) -> tuple[Runner, list[Tokens]]:
    ids = [row[: min(size, length)] for row, size in zip(IDS[:rows], LENGTHS[:rows], strict=True)]
    runner = Runner(model, PagedCache(model.config, num_blocks=70, block_size=8), strict=True)
    return runner, scattered(ids, num_blocks=70, block_size=8, seed=rows)


def logits_of_the_first(model: glm5.GLM5, steps: list[int], rows: int, length: int) -> Tensor:
    """Of a sequence beside others, with steps of these numbers of tokens in turn."""
    runner, found = sequences(model, rows, length)
    while found[0].done < length:
        for tokens in steps:
            feed(runner, found, tokens)
    return torch.cat(found[0].logits)


@pytest.mark.parametrize("pattern", [("full", "full"), ("full", "shared")])
def test_a_token_is_computed_the_same_way_in_any_company(pattern, decoder):
    model, length = tiny_model(1, indexer_types=pattern), 150 if decoder else 30
    alone = logits_of_the_first(model, [length], 1, length)
    for steps, rows in (([1], 1), ([1], 7), ([7, 18, 1], 7), ([33], 3), ([65], 7)):
        assert torch.equal(logits_of_the_first(model, steps, rows, length), alone)
    with torch.no_grad():
        torch.testing.assert_close(alone, model(torch.tensor([IDS[0][:length]])).logits[0], rtol=1e-4, atol=1e-4)


def test_a_fork_of_blocks_goes_on_as_the_whole_sequence_would(decoder):
    model = tiny_model(1)
    runner, [row] = sequences(model, 1, 40)
    feed(runner, [row], 29)
    fork = Tokens(IDS[0][:29] + IDS[1][:11], [*row.block_table[:3], 60, 61], 29)
    runner.cache.copy_blocks([(row.block_table[3], 60)])
    for tokens in (1, 3, 7):
        feed(runner, [row, fork], tokens)
    whole = Tokens(fork.ids, list(range(5)))
    fresh = Runner(model, PagedCache(model.config, num_blocks=5, block_size=8), strict=True)
    feed(fresh, [whole], 40)
    assert torch.equal(torch.cat(fork.logits), whole.logits[0][29:])


@pytest.mark.parametrize("adapted", [False, True])
def test_the_trainers_logprobs_are_the_engines_to_the_bit(adapted, decoder):
    """With adapters the modules run on both sides."""
    model = tiny_model(1)
    if adapted:
        add_adapters(model, rank=2, targets=("*.kv_b_proj",))
    length = 150 if decoder and not adapted else 30
    runner, found = sequences(model, 4, length)
    for tokens in (7, 1, 1):
        feed(runner, found, tokens)
    while found[0].done < length:
        feed(runner, found, 3)
    for row in found:
        logits_TV = torch.cat(row.logits)
        engine = [token_logprobs(logits_TV[i], token, None)[0] for i, token in enumerate(row.ids[1:])]
        assert strict_logprobs(model, row.ids).tolist() == engine


@needs_extension
def test_strict_logprobs_are_the_models_own():
    """Of `nano`, whose parity with `transformers` is tested elsewhere; where no near-tie falls the other way."""
    model = glm5.GLM5(glm5.ModelConfig.from_preset("nano")).eval()
    initialize_(model, 0.05, seed=0)
    ids = torch.randint(0, 4096, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted_TV = model(ids).logits[0, :-1].log_softmax(-1)
    wanted = wanted_TV.gather(1, ids[0, 1:, None])[:, 0]
    difference = (strict_logprobs(model, ids[0].tolist()) - wanted).abs()
    assert difference[:63].max() < 1e-5  # nothing is left out yet
    assert difference.median() < 1e-5 and (difference < 1e-4).float().mean() > 0.9


def test_what_strict_mode_cannot_do_is_refused():
    model = tiny_model(1)
    with pytest.raises(InputError, match="fp32"):
        Runner(model, PagedCache(model.config, num_blocks=8, storage="bf16"), strict=True)
    with pytest.raises(InputError, match="at least two"):
        strict_logprobs(model, [1])
