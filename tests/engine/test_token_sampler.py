"""What `TokenSampler` does to the logits, against the formulas and against `transformers`' logits processors."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glm5.engine import SamplingParams
from glm5.engine.sampler import filtered_probabilities, prompt_logprobs, sample_token, uniform, uniforms
from glm5.engine.token_sampler import TokenSampler
from glm5.errors import InputError

VOCAB = 50


def random_logits(seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sampler_after(params: SamplingParams, prompt: list[int], output: list[int], **more) -> TokenSampler:
    sampler = TokenSampler(params, prompt, seed=5, **more)
    for token in output:
        sampler.accept(token)
    return sampler


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(max_examples=30, deadline=None)
@given(tokens, tokens, st.floats(0.2, 3), st.floats(-2, 2), st.floats(-2, 2),
       st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=5), st.integers(0, 999))  # fmt: skip
def test_penalties_and_bias_are_their_formulas_in_vllms_order(prompt, output, repetition, frequency, presence, bias, s):
    params = SamplingParams(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias
    )
    logits_V = random_logits(s)
    sampler = sampler_after(params, prompt, output)
    expected = []
    for token, x in enumerate(logits_V.tolist()):
        x += bias.get(token, 0.0)
        if token in prompt or token in output:
            x = x / repetition if x > 0 else x * repetition
        x -= frequency * output.count(token)
        x -= presence * (token in output)
        expected.append(x)
    before_V = logits_V.clone()
    torch.testing.assert_close(sampler.adjusted(logits_V), torch.tensor(expected), rtol=1e-5, atol=2e-5)
    assert torch.equal(logits_V, before_V)


@settings(max_examples=30, deadline=None)
@given(tokens.filter(len), tokens, st.floats(0.2, 3), st.integers(0, 999))
def test_repetition_penalty_equals_transformers_to_the_bit(prompt, output, penalty, seed):
    logits_V = random_logits(seed)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits_V[None].clone())[0]
    ours = sampler_after(SamplingParams(repetition_penalty=penalty), prompt, output).adjusted(logits_V)
    assert torch.equal(ours, theirs)


def test_logit_bias_equals_transformers_to_the_bit():
    logits_V, bias = random_logits(1), {3: 2.5, 7: -100.0, 49: 100.0}
    theirs = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(
        torch.tensor([[1]]), logits_V[None].clone()
    )[0]
    assert torch.equal(sampler_after(SamplingParams(logit_bias=bias), [1], []).adjusted(logits_V), theirs)


@pytest.mark.parametrize("output", [0, 2, 3, 4])
def test_min_tokens_equals_transformers(output):
    logits_V, prompt, stop_ids = random_logits(2), [1, 2], {4, 9}
    ids = torch.tensor([prompt + [7] * output])
    theirs = MinNewTokensLengthLogitsProcessor(2, 3, sorted(stop_ids), device="cpu")(ids, logits_V[None].clone())[0]
    sampler = sampler_after(SamplingParams(min_tokens=3), prompt, [7] * output, stop_ids=stop_ids)
    assert torch.equal(sampler.adjusted(logits_V), theirs)
    assert (sampler.adjusted(logits_V)[9] == -torch.inf) == (output < 3)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.2, 3), st.integers(1, 40), st.floats(0.05, 0.99), st.floats(0.001, 0.5), st.integers(0, 999))
def test_filters_equal_transformers(temperature, top_k, top_p, min_p, seed):
    logits_1V = random_logits(seed).double()[None]
    for params, warpers in (
        ({"top_k": top_k, "top_p": top_p}, [TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]),
        ({"min_p": min_p}, [MinPLogitsWarper(min_p)]),
    ):
        params = SamplingParams(temperature=temperature, **params)
        theirs_1V = TemperatureLogitsWarper(temperature)(None, logits_1V.clone())
        for warper in warpers:
            theirs_1V = warper(None, theirs_1V)
        torch.testing.assert_close(filtered_probabilities(logits_1V[0], params), theirs_1V[0].softmax(-1))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.3, 30), st.floats(0.01, 1), st.integers(0, 900), st.booleans(), st.integers(0, 99))
def test_large_vocabularies_are_cut_as_small_ones(temperature, top_p, top_k, ties, seed):
    """Above `HEAD` tokens the nucleus is sought among the likeliest first; the whole sort is the reference."""
    logits_V = random_logits(seed, 1000).double()
    if ties:
        logits_V = logits_V.round()
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
    weights_V = ((logits_V - logits_V.max()) / temperature).exp()
    sorted_V, order_V = weights_V.sort(descending=True, stable=True)
    sorted_V[top_k or 1000 :] = 0.0
    sorted_V[sorted_V.cumsum(-1) - sorted_V >= top_p * sorted_V.sum()] = 0.0
    expected_V = torch.zeros_like(weights_V).scatter_(0, order_V, sorted_V)
    torch.testing.assert_close(
        filtered_probabilities(logits_V, params), expected_V / expected_V.sum(), rtol=1e-12, atol=0
    )


def test_blocks_of_random_numbers_are_the_single_ones():
    for start in (0, 63, 200_000):
        assert uniforms(9, 2, start, 130) == [uniform(9, 2, start + i) for i in range(130)]
    sampler = TokenSampler(SamplingParams(), [1], seed=9, index=2)
    assert [sampler.uniform(p) for p in (70, 3, 64, 63, 70)] == [uniform(9, 2, p) for p in (70, 3, 64, 63, 70)]


def test_settings_that_change_nothing_copy_nothing():
    logits_V = random_logits(3)
    for params in (SamplingParams(), SamplingParams(temperature=0.0, logit_bias={}), SamplingParams(min_tokens=2)):
        assert sampler_after(params, [1], [2]).adjusted(logits_V) is logits_V


def test_a_penalised_token_still_reports_the_models_own_logprob():
    logits_V = random_logits(4)
    best = int(logits_V.argmax())
    params = SamplingParams(temperature=0.0, logit_bias={best: -100}, logprobs=2)
    sampled = sampler_after(params, [1], []).sample(logits_V, 1)
    logprobs_V = logits_V.log_softmax(-1)
    assert sampled.token_id == int(logits_V.topk(2).indices[1])
    assert sampled.logprob == float(logprobs_V[sampled.token_id])
    assert sampled.top_logprobs[0] == (best, float(logprobs_V[best]))


@settings(max_examples=30, deadline=None)
@given(tokens, tokens, st.integers(0, 999))
def test_rollback_forgets_what_was_accepted(kept, undone, seed):
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.3, min_tokens=6)
    logits_V, more = random_logits(seed), {"stop_ids": {3}}
    straight = sampler_after(params, [1, 2], kept, **more)
    back = sampler_after(params, [1, 2], [], **more)
    back.adjusted(logits_V)  # builds the counts before the tokens come
    for token in kept + undone:
        back.accept(token)
    back.rollback(len(undone))
    assert torch.equal(back.adjusted(logits_V), straight.adjusted(logits_V))
    assert back.sample(logits_V, 9) == straight.sample(logits_V, 9)
    with pytest.raises(ValueError, match="cannot be undone"):
        back.rollback(len(kept) + 1)


def test_prompt_logprobs_are_those_of_each_next_token():
    logits_TV = torch.stack([random_logits(i) for i in range(3)])
    found = prompt_logprobs(logits_TV, [4, 0, 49], 2)
    logprobs_TV = logits_TV.log_softmax(-1)
    assert [f.logprob for f in found] == [float(logprobs_TV[i, t]) for i, t in enumerate([4, 0, 49])]
    assert [[t for t, _ in f.top_logprobs] for f in found] == logits_TV.topk(2).indices.tolist()
    assert math.isclose(
        sum(math.exp(x) for _, x in prompt_logprobs(logits_TV, [4, 0, 49], VOCAB)[0][2]), 1, rel_tol=1e-5
    )


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [("presence_penalty", 2.1, "presence_penalty is 2.1; .* at least -2 and at most 2"),
     ("frequency_penalty", float("nan"), "frequency_penalty is nan"), ("repetition_penalty", 0, "at least 0.01"),
     ("repetition_penalty", 1e-46, "at least 0.01"), ("repetition_penalty", 1e300, "at most 100"),
     ("logit_bias", {1: 101}, "logit_bias of token 1 is 101; .* at most 100"), ("logit_bias", [1], "give a dict"),
     ("logit_bias", {"1": 3}, "logit_bias key is '1'"), ("logit_bias", {-1: 3}, "key is -1"),
     ("logit_bias", dict.fromkeys(range(1025), 1), "has 1,025 entries"),
     ("prompt_logprobs", 21, "prompt_logprobs is 21; .* from 0 to 20"), ("prompt_logprobs", True, "whole number"),
     ("structured_outputs", {"json": {}}, "is a dict; give a StructuredOutputs")],
)  # fmt: skip
def test_bad_settings_are_refused_with_a_sentence(field, value, sentence):
    with pytest.raises(InputError, match=sentence):
        SamplingParams(**{field: value})


@settings(max_examples=30, deadline=None)
@given(tokens, st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), min_size=1, max_size=5))
def test_bad_sequences_equal_transformers(output, bad):
    bad = [*bad, [*output[-2:], 7]]  # one that the output is about to complete
    sampler = sampler_after(SamplingParams(bad_sequences=bad), [1, 2], output)
    logits_V = random_logits(3)
    ids_1T = torch.tensor([output], dtype=torch.long)
    expected_V = NoBadWordsLogitsProcessor(bad)(ids_1T, logits_V[None])[0]
    assert torch.equal(sampler.adjusted(logits_V), expected_V)
    assert sampler.choose(logits_V, 5) == sample_token(expected_V, sampler.params, sampler.uniform(5))


@pytest.mark.parametrize("bad", [5, [5], [[]], [[-1]], [["x"]], [[1]] * 129, [[1] * 65]])
def test_bad_sequences_that_are_none_are_refused(bad):
    with pytest.raises(InputError, match="bad_sequences"):
        SamplingParams(bad_sequences=bad)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_request_that_forbids_every_token_is_refused_and_never_gets_the_last_one(temperature, cuts):
    every = [[token] for token in range(VOCAB)]
    params = SamplingParams(temperature=temperature, bad_sequences=every, **cuts)
    with pytest.raises(InputError, match="leave no token to sample"):
        sampler_after(params, [1], []).sample(random_logits(0), 1)
    one = SamplingParams(temperature=temperature, bad_sequences=every[:7] + every[8:], **cuts)
    assert sampler_after(one, [1], []).sample(random_logits(0), 1).token_id == 7
    with pytest.raises(InputError, match="leave no token to sample"):  # nor from what is no number
        sample_token(random_logits(0).index_fill(0, torch.tensor([3]), math.nan), replace(one, bad_sequences=()), 0.5)


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_strongest_penalties_leave_finite_logits(penalty):
    sampler = sampler_after(SamplingParams(repetition_penalty=penalty), list(range(VOCAB)), [])
    assert sampler.adjusted(random_logits(1) * 1e4).isfinite().all()
