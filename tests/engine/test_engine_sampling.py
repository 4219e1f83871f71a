"""Sampling settings through the engine: what `TokenSampler` promises holds for batches, samples, preemption, drafts."""

import json
from dataclasses import replace

import jsonschema
import pytest
import torch
from speaker import speaker_model, speaker_tokenizer
from test_grammar import SCHEMA, TOOL, TOOL_CALL
from test_speculation import Always, agreeing_model, drafting_engine

from glm5 import parse_assistant
from glm5.engine import Engine, SamplingParams, StructuredOutputs
from glm5.engine.grammar_state import GrammarState
from glm5.engine.token_sampler import TokenSampler
from glm5.errors import InputError

PROMPT = [5, 6, 7, 8, 9, 9]
PARAMS = SamplingParams(seed=3, max_tokens=24, ignore_eos=True)


@torch.inference_mode()
def one_by_one(model, prompt, params, index=0):
    """The request's definition: a whole forward pass for every token."""
    sampler, ids = TokenSampler(params, prompt, seed=params.seed, index=index), list(prompt)
    for _ in range(params.max_tokens):
        sampled = sampler.sample(model(torch.tensor([ids])).logits[0, -1], len(ids))
        sampler.accept(sampled.token_id)
        ids.append(sampled.token_id)
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.0, "repetition_penalty": 1.4}, {"presence_penalty": 1.5}, {"frequency_penalty": -0.8},
     {"logit_bias": {40: 6.0, 41: -100.0}, "top_k": 20, "n": 3}],
)  # fmt: skip
def test_penalties_and_bias_through_the_engine(changes):
    model, params = speaker_model(), replace(PARAMS, **changes)
    (output,) = Engine(model).generate([PROMPT], params)
    assert [o.token_ids for o in output.outputs] == [one_by_one(model, PROMPT, params, i) for i in range(params.n)]
    assert output.token_ids != one_by_one(model, PROMPT, PARAMS)


def test_prompt_logprobs_are_the_models_own():
    model, params = speaker_model(), replace(PARAMS, prompt_logprobs=2, max_tokens=2)
    engine = Engine(model, block_size=4, max_num_batched_tokens=4)
    with torch.inference_mode():
        logprobs_TV = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    for _ in range(2):  # the second time the prefix lies in the cache
        first, *rest = engine.generate([PROMPT], params)[0].prompt_logprobs
        assert first is None and [found.token_id for found in rest] == PROMPT[1:]
        expected = [float(logprobs_TV[i, token]) for i, token in enumerate(PROMPT[1:])]
        assert [found.logprob for found in rest] == pytest.approx(expected, abs=1e-5)
        likeliest = [[token for token, _ in found.top_logprobs] for found in rest]
        assert likeliest == logprobs_TV[:-1].topk(2).indices.tolist()
    assert engine.generate([PROMPT], PARAMS)[0].prompt_logprobs is None


def test_an_untrained_model_answers_in_the_asked_structure_in_a_tight_cache():
    """Several samples and structures together, preempted now and then, beside a request without structure."""
    tokenizer = speaker_tokenizer()
    engine = Engine(speaker_model(), tokenizer, block_size=8, num_blocks=26)
    call = replace(PARAMS, seed=4, structured_outputs=StructuredOutputs(grammar=TOOL_CALL), max_tokens=None, n=2)
    whole = replace(PARAMS, seed=4, structured_outputs=StructuredOutputs(json=SCHEMA), max_tokens=None)
    objects, calls, other, free = engine.generate([PROMPT] * 4, [whole, call, replace(whole, seed=14), PARAMS])
    assert engine.stats().preemptions > 0
    for output in calls.outputs:
        (found,) = parse_assistant(output.text, tools=[TOOL])["tool_calls"]
        assert found["function"]["name"] == "get_weather"
        assert list(json.loads(found["function"]["arguments"])) == ["city", "days"]
        assert (output.finish_reason, output.stop_reason) == ("stop", None)
    for output in (objects, other):
        jsonschema.validate(json.loads(output.text), SCHEMA)
        assert output.finish_reason == "stop"
    assert free.token_ids == Engine(speaker_model()).generate([PROMPT], PARAMS)[0].token_ids
    engine.close()


def test_structure_and_speculation_give_the_same_tokens():
    tokenizer = speaker_tokenizer()
    model = agreeing_model(vocab_size=320, eos_token_id=tokenizer.eos_ids)
    params = replace(PARAMS, structured_outputs=StructuredOutputs(regex="(ab|cd|[0-9]){8}x"), max_tokens=40)
    outputs = []
    for k in (0, 3):
        engine = Engine(model, tokenizer, strict=True, block_size=8, num_blocks=20, num_speculative_tokens=k)
        if k:
            engine._core.speculator.pace = Always()
        outputs.append(engine.generate([PROMPT], params))
        engine.close()
    assert outputs[0] == outputs[1]
    assert outputs[0][0].text.endswith("x") and engine.stats().accepted_tokens > 0


def test_a_structure_that_breaks_down_costs_its_own_request_only(monkeypatch):
    engine, other = Engine(speaker_model(), speaker_tokenizer()), []
    structured = replace(PARAMS, structured_outputs=StructuredOutputs(regex="[0-9]{30}"))
    allowed, calls = GrammarState.allowed, []

    def failing(self):
        calls.append(1)
        if len(calls) == 4:
            raise InputError("The structured output cannot go on: too complex.")
        return allowed(self)

    monkeypatch.setattr(GrammarState, "allowed", failing)
    stream = engine.stream(PROMPT, PARAMS)
    with pytest.raises(InputError, match="too complex"):
        engine.generate([PROMPT], structured)
    other += [delta.token_id for delta in stream]
    assert tuple(other) == one_by_one(speaker_model(), PROMPT, PARAMS)
    engine.close()


@pytest.mark.parametrize(
    ("params", "sentence"),
    [({"logit_bias": {320: 1}}, "logit_bias holds 320, which is no token id below 320"),
     ({"structured_outputs": StructuredOutputs(regex="a")}, "structured_outputs need a tokenizer")],
)  # fmt: skip
def test_refusals(params, sentence):
    with pytest.raises(InputError, match=sentence):
        Engine(speaker_model()).stream(PROMPT, SamplingParams(**params))
    with pytest.raises(InputError, match="regex cannot be used"):
        Engine(speaker_model(), speaker_tokenizer()).stream(
            PROMPT, SamplingParams(structured_outputs=StructuredOutputs(regex="("))
        )


def test_drafting_needs_no_more_than_the_request_may_use():
    """A request that fills context and cache to the last token, with drafts that would reach beyond."""
    engine = drafting_engine(agreeing_model(), 4, max_model_len=24, num_blocks=6)
    (output,) = engine.generate([PROMPT], SamplingParams(max_tokens=None, ignore_eos=True, seed=1))
    assert len(output.token_ids) == 18 and output.finish_reason == "length"
    engine._core.scheduler.check()
