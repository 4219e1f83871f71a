"""Exactness with the real runner: batch, chunks, cached prefixes, preemption and new weights, strict to the bit."""

from dataclasses import replace

import pytest
import torch
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.engine.strict import strict_logprobs
from glm5.errors import CheckpointError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ROOT = list(range(20, 60))
PROMPTS = [ROOT[:3], ROOT, ROOT[:30], [*ROOT, 7], [9], ROOT[5:25]]
PARAMS = [GREEDY, replace(GREEDY, temperature=1.0, seed=3, n=2), GREEDY, GREEDY, replace(GREEDY, max_tokens=20), GREEDY]


@pytest.fixture(scope="module")
def model():
    return speaker_model()


def answers(engine, prompts=PROMPTS, params=PARAMS):
    """Tokens and logprobs of every completion."""
    outputs = engine.generate(prompts, params)
    return [[(c.token_ids, c.logprobs) for c in output.outputs] for output in outputs]


CUTS = {
    "batch": {"block_size": 8},
    "chunks": {"block_size": 8, "max_num_batched_tokens": 7},
    "small blocks, preemption": {"block_size": 4, "num_blocks": 18},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_seqs": 3},
}


@pytest.fixture(scope="module")
def alone(model):
    """Every request by itself, strict."""
    engine = Engine(model, strict=True, enable_prefix_caching=False)
    return [answers(engine, [prompt], [params])[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize("cut", CUTS)
def test_strict_tokens_and_logprobs_are_those_of_the_request_alone_to_the_bit(model, alone, cut):
    engine = Engine(model, strict=True, **CUTS[cut])
    assert answers(engine) == alone
    if "num_blocks" in CUTS[cut]:
        assert engine.stats().preemptions > 0
    cached = engine.stats().cached_tokens
    assert answers(engine) == alone  # now from the prefix cache, where there is one
    assert (engine.stats().cached_tokens > cached) == (cut != "no prefix cache")


@pytest.mark.parametrize("cut", CUTS)
def test_fast_tokens_follow_strict_ones_and_logprobs_are_near(model, alone, cut):
    """Fast mode promises the distribution; at this size its greedy tokens do not flip."""
    for fast, strict in zip(answers(Engine(model, **CUTS[cut])), alone, strict=True):
        for (fast_ids, fast_logprobs), (strict_ids, exact) in zip(fast, strict, strict=True):
            assert fast_ids == strict_ids
            torch.testing.assert_close(torch.tensor(fast_logprobs), torch.tensor(exact), atol=1e-4, rtol=0)


def test_prompt_logprobs_are_the_models_whatever_is_cached_and_chunked(model):
    prompt = ROOT
    logprobs_TV = model(torch.tensor([prompt])).logits[0].detach().log_softmax(-1)
    expected = logprobs_TV[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    engine = Engine(model, max_num_batched_tokens=9, block_size=4)
    engine.generate([prompt], GREEDY)
    for params in (replace(GREEDY, prompt_logprobs=2, n=2), replace(GREEDY, prompt_logprobs=0)):
        (output,) = engine.generate([prompt], params)
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        entries = output.prompt_logprobs[1:]
        assert [entry[0] for entry in entries] == prompt[1:]
        torch.testing.assert_close(torch.tensor([entry[1] for entry in entries]), expected, atol=2e-5, rtol=0)
        assert [len(entry[2]) for entry in entries] == [params.prompt_logprobs] * 39
        stream = engine.stream(prompt, params)
        next(stream)
        assert len(stream.prompt_logprobs) == 40 and stream.cached_tokens == 0
        stream.close()
    assert engine.generate([prompt], GREEDY)[0].prompt_logprobs is None


def test_every_strict_logprob_is_the_trainers_under_the_version_that_sampled_it():
    """To the bit, although the weights change while the sequences run."""
    models = [speaker_model(0), speaker_model(1)]
    engine = Engine(speaker_model(0), strict=True, max_num_batched_tokens=16, block_size=8)
    params = SamplingParams(seed=5, max_tokens=400, ignore_eos=True)  # more than wait for a reader
    streams = [engine.stream(prompt, params) for prompt in PROMPTS[:3]]
    first = [next(stream) for stream in streams]
    engine.update_weights(1, models[1].state_dict())
    for prompt, head, stream in zip(PROMPTS, first, streams, strict=False):
        deltas = [head, *stream]
        versions = [delta.version for delta in deltas]
        assert versions == sorted(versions) and set(versions) == {0, 1} and len(versions) == 400
        ids = [*prompt, *(delta.token_id for delta in deltas)]
        trainer = [strict_logprobs(model, ids)[len(prompt) - 1 :].tolist() for model in models]
        assert [d.logprob for d in deltas] == [trainer[v][i] for i, v in enumerate(versions)]


def test_new_weights_repair_what_damaged_ones_broke():
    good, model = speaker_model(), speaker_model()
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float("nan")
    engine = Engine(model, speaker_tokenizer())
    with pytest.raises(CheckpointError, match="weights version 0"):
        engine.generate([[5, 6]], GREEDY)
    engine.update_weights(1, good.state_dict())
    assert answers(engine, [[5, 6]], [GREEDY]) == answers(Engine(good), [[5, 6]], [GREEDY])
