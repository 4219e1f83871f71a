"""The engine against the model without a cache, and its contract: seeds, stops, limits, weights, streams."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.errors import InputError

GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
PROMPTS = [[5, 6, 7], [100, 101, 102, 103, 104, 105, 106, 107, 108, 109], [9], [50, 60, 70]]


@pytest.fixture
def tiny_model():
    return speaker_model()


@pytest.fixture
def tiny_tokenizer():
    return speaker_tokenizer()


def without_cache(model, prompt, tokens):
    """Greedy continuation by one whole forward pass per token."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_cached_greedy_tokens_equal_the_forward_pass_without_cache(tiny_model, attention):
    engine = Engine(tiny_model, attention=attention)
    outputs = engine.generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = list(prompt)
        for token in output.token_ids:
            assert token == int(tiny_model(torch.tensor([ids]), attention=attention).logits[0, -1].argmax())
            ids.append(token)
        assert output.prompt_token_ids == tuple(prompt)
        assert (len(output.token_ids), output.finish_reason) == (32, "length")


def test_logprobs_equal_one_forward_pass_over_the_whole_sequence(tiny_model):
    output = Engine(tiny_model).generate(
        [PROMPTS[0]], SamplingParams(max_tokens=24, seed=3, ignore_eos=True, logprobs=4)
    )[0]
    ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]])
    logprobs_TV = tiny_model(ids).logits[0, 2:-1].log_softmax(-1)
    expected = logprobs_TV.gather(-1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(output.logprobs), expected, atol=2e-5, rtol=0)
    top_TK = torch.tensor([[value for _, value in row] for row in output.outputs[0].top_logprobs])
    torch.testing.assert_close(top_TK, logprobs_TV.topk(4).values, atol=2e-5, rtol=0)


def test_logprobs_are_the_raw_models_whatever_is_masked_and_filtered(tiny_model):
    engine = Engine(tiny_model)
    likeliest = engine.generate([PROMPTS[0]], GREEDY)[0].token_ids[0]
    params = SamplingParams(
        temperature=0.5, top_k=3, top_p=0.8, min_p=0.01, min_tokens=10, max_tokens=10, seed=3, logprobs=2,
        stop_token_ids=[likeliest],
    )  # fmt: skip
    output = engine.generate([PROMPTS[0]], params)[0]
    ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]])
    logprobs_TV = tiny_model(ids).logits[0, 2:-1].detach().log_softmax(-1)
    expected = logprobs_TV.gather(-1, ids[0, 3:, None])[:, 0]
    assert likeliest not in output.token_ids  # it was masked
    torch.testing.assert_close(torch.tensor(output.logprobs), expected, atol=2e-5, rtol=0)
    top_token, top_logprob = output.outputs[0].top_logprobs[0][0]
    assert top_token == likeliest and top_logprob == pytest.approx(float(logprobs_TV[0, likeliest]), abs=2e-5)


def test_a_bfloat16_model_gives_the_logprobs_of_its_own_forward_pass():
    model = speaker_model().bfloat16()
    output = Engine(model).generate([[5, 6]], SamplingParams(seed=1, max_tokens=12, ignore_eos=True))[0]
    ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]])
    logprobs_TV = model(ids).logits[0, 1:-1].float().log_softmax(-1)
    expected = logprobs_TV.gather(-1, ids[0, 2:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(output.logprobs), expected, atol=0.3, rtol=0)


def test_a_seeded_request_does_not_depend_on_its_batch(tiny_model):
    params = [SamplingParams(seed=seed, max_tokens=16, n=2) for seed in (1, 2, 3, 1)]
    engine = Engine(tiny_model)
    together = engine.generate(PROMPTS, params)
    alone = [engine.generate([prompt], p)[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    one_row = Engine(tiny_model, max_num_seqs=1).generate(PROMPTS, params)
    ids = lambda outputs: [[c.token_ids for c in o.outputs] for o in outputs]
    assert ids(together) == ids(alone) == ids(one_row)
    assert together[0].outputs[0].token_ids != together[0].outputs[1].token_ids
    assert [c.index for c in together[0].outputs] == [0, 1]


def test_a_request_without_a_seed_reports_the_one_it_drew(tiny_model):
    engine = Engine(tiny_model)
    first = engine.generate([[5]], SamplingParams(max_tokens=20))[0]
    second = engine.generate([[5]], SamplingParams(max_tokens=20))[0]
    assert first.outputs[0].seed != second.outputs[0].seed
    again = engine.generate([[5]], SamplingParams(max_tokens=20, seed=first.outputs[0].seed))[0]
    assert again.token_ids == first.token_ids


def test_stop_tokens_end_the_sequence_and_stay_in_the_ids(tiny_model):
    engine = Engine(tiny_model)
    whole = engine.generate([[5]], GREEDY)[0].token_ids
    stop = whole[4]
    cut = whole.index(stop) + 1
    output = engine.generate([[5]], replace(GREEDY, stop_token_ids=[stop]))[0]
    assert (output.token_ids, output.finish_reason, output.outputs[0].stop_reason) == (whole[:cut], "stop", stop)
    engine.eos_ids = frozenset({stop})
    ended = engine.generate([[5]], replace(GREEDY, ignore_eos=False))[0]
    assert (ended.token_ids, ended.finish_reason, ended.outputs[0].stop_reason) == (whole[:cut], "stop", None)
    assert engine.generate([[5]], GREEDY)[0].token_ids == whole
    late = engine.generate([[5]], replace(GREEDY, ignore_eos=False, min_tokens=cut + 3))[0]
    assert stop not in late.token_ids[: cut + 3] and len(late.token_ids) >= cut + 3


def test_stop_strings_cut_the_text(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer)
    params = SamplingParams(seed=11, max_tokens=48, ignore_eos=True)
    text = engine.generate([[5, 6]], params)[0].text
    stop = text[6:9]
    output = engine.generate([[5, 6]], replace(params, stop=stop))[0]
    assert (output.text, output.finish_reason, output.outputs[0].stop_reason) == (text.split(stop)[0], "stop", stop)
    included = engine.generate([[5, 6]], replace(params, stop=stop, include_stop_str_in_output=True))[0]
    assert included.text == text.split(stop)[0] + stop
    assert engine.generate([[5, 6]], replace(params, stop="\x00never"))[0].text == text


def test_text_is_the_decoded_tokens(tiny_model, tiny_tokenizer):
    output = Engine(tiny_model, tiny_tokenizer).generate(
        [[40, 41]], SamplingParams(seed=2, max_tokens=60, ignore_eos=True)
    )[0]
    assert output.text == tiny_tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_stream_yields_what_generate_returns(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer)
    params = SamplingParams(seed=4, n=3, max_tokens=12)
    output = engine.generate([[7, 8]], params)[0]
    deltas = list(engine.stream([7, 8], params))
    for completion in output.outputs:
        mine = [d for d in deltas if d.index == completion.index]
        assert tuple(d.token_id for d in mine) == completion.token_ids
        assert "".join(d.text for d in mine) == completion.text
        assert [d.finish_reason for d in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]


def test_new_weights_are_taken_between_steps_and_named_by_token(tiny_model):
    engine = Engine(tiny_model, version=3)
    other = speaker_model(seed=1)
    stream = engine.stream([5], replace(GREEDY, max_tokens=300))  # more than wait for a reader
    versions = [next(stream).version for _ in range(5)]
    engine.update_weights(7, other.state_dict())
    versions += [delta.version for delta in stream]
    assert versions == sorted(versions) and set(versions) == {3, 7} and len(versions) == 300
    assert versions[:5] == [3] * 5
    assert engine.generate([[5]], GREEDY)[0].token_ids == without_cache(other, [5], 32)


def test_wrong_weights_are_refused_before_anything_changes(tiny_model):
    engine = Engine(tiny_model, version=2)
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    with pytest.raises(InputError, match="came after version 2"):
        engine.update_weights(2, before)
    with pytest.raises(InputError, match=r"lack 'lm_head.weight'"):
        engine.update_weights(3, {k: v for k, v in before.items() if k != "lm_head.weight"})
    with pytest.raises(InputError, match="hold unknown 'x'"):
        engine.update_weights(3, {**before, "x": torch.zeros(1)})
    changed = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    with pytest.raises(InputError, match=r"lm_head\.weight is"):
        engine.update_weights(3, {**changed, "lm_head.weight": torch.zeros(2, 2)})
    for bad in (float("nan"), float("inf")):
        poisoned = changed["lm_head.weight"].clone()
        poisoned[3, 1] = bad
        with pytest.raises(InputError, match=r"lm_head\.weight of version 3 holds NaN or infinity"):
            engine.update_weights(3, {**changed, "lm_head.weight": poisoned})
    assert engine.version == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


def test_numpys_numbers_are_as_good_as_pythons(tiny_model):
    given = {
        "n": 2, "max_tokens": 5, "min_tokens": 1, "seed": 9, "top_k": 20, "logprobs": 1, "prompt_logprobs": 1,
        "temperature": 0.5, "top_p": 0.75, "repetition_penalty": 1.25, "stop_token_ids": [3], "logit_bias": {4: -1.5},
        "bad_sequences": [[5, 6]],
    }  # fmt: skip

    def numpys(value):
        if isinstance(value, dict):
            return {numpys(key): numpys(one) for key, one in value.items()}
        if isinstance(value, list):
            return [numpys(one) for one in value]
        return (np.int64 if isinstance(value, int) else np.float32)(value)

    ours = SamplingParams(**given)
    theirs = SamplingParams(**{name: numpys(value) for name, value in given.items()})
    assert theirs == ours and repr(theirs) == repr(ours)
    for name in ("n", "temperature", "seed"):
        with pytest.raises(InputError, match=f"{name} is True"):
            SamplingParams(**{name: True})
    engine = Engine(tiny_model)
    [output] = engine.generate([list(np.array([5, 6, 7], dtype=np.int32))], theirs)
    assert output == engine.generate([[5, 6, 7]], ours)[0]
    assert all(type(token) is int for token in output.prompt_token_ids)


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [([], {}, "empty"), ([320], {}, "320, which is no token id"), ([-1], {}, "no token id below 320"),
     (["a"], {}, "no token id"), ([True], {}, "holds True, which is no token id"),
     ([np.int64(320)], {}, "no token id below 320"), ([1.0], {}, r"holds 1\.0, which is no token id"),
     ([1] * 500, {"max_tokens": 13}, r"500 prompt tokens \+ 13 new.*limit is 512"),
     ([1] * 512, {"max_tokens": None}, "512 prompt tokens, but the context limit is 512"),
     ([1], {"stop": "x"}, "need a tokenizer"),
     ([1], {"stop_token_ids": [320], "min_tokens": 2}, "stop_token_ids holds 320, which is no token id below 320"),
     (None, {}, "a NoneType; give a list of token ids"), (torch.tensor([1]), {}, "a Tensor; give a list of token ids")],
)  # fmt: skip
def test_requests_that_cannot_run_are_refused_before_work_starts(tiny_model, prompt, params, sentence):
    engine = Engine(tiny_model)
    with pytest.raises(InputError, match=sentence):
        engine.generate([[1], prompt], SamplingParams(**params))
    with pytest.raises(InputError, match=sentence):
        engine.stream(prompt, SamplingParams(**params))  # by the call itself, not by the first token


def test_other_refusals(tiny_model):
    for prompts in (None, torch.tensor([[1, 2]]), 5):
        with pytest.raises(InputError, match="list of lists"):
            Engine(tiny_model).generate(prompts)
    with pytest.raises(InputError, match="a dict; give one SamplingParams"):
        Engine(tiny_model).generate([[1]], {"n": 2})
    with pytest.raises(InputError, match="settings are a dict"):
        Engine(tiny_model).stream([1], {"n": 2})
    with pytest.raises(InputError, match=r"max_model_len is 0; .* from 2 to 512"):
        Engine(tiny_model, max_model_len=0)
    with pytest.raises(InputError, match=r"max_num_seqs is '3'; .* whole number"):
        Engine(tiny_model, max_num_seqs="3")
    with pytest.raises(InputError, match="list of lists"):
        Engine(tiny_model).generate([1, 2, 3])
    with pytest.raises(InputError, match="2 prompts and 1 SamplingParams"):
        Engine(tiny_model).generate([[1], [2]], [SamplingParams()])
    with pytest.raises(InputError, match="max_model_len is 513"):
        Engine(tiny_model, max_model_len=513)
    with pytest.raises(InputError, match="max_num_seqs is 0"):
        Engine(tiny_model, max_num_seqs=0)
    for wrong, sentence in (
        ({"priority": 1.5}, "priority is 1.5"), ({"priority": 2000}, "priority is 2000"),
        ({"deadline": 0}, "deadline is 0"), ({"deadline": 1e300}, "at most 604800"),
        ({"session_id": 3}, "session_id is 3"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            Engine(tiny_model).stream([1], **wrong)
    for wrong, sentence in (
        ({"block_size": 0}, "block_size is 0"), ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"num_blocks": 0}, "num_blocks is 0"), ({"num_blocks": 2, "memory_bytes": 9**9}, "give one of them"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            Engine(tiny_model, **wrong)


def test_the_context_can_be_filled_to_the_last_token(tiny_model):
    output = Engine(tiny_model, max_model_len=40).generate(
        [[1] * 10], SamplingParams(max_tokens=None, ignore_eos=True)
    )[0]
    assert (len(output.token_ids), output.finish_reason) == (30, "length")


def test_threads_take_turns_and_get_their_own_answers(tiny_model):
    engine = Engine(tiny_model)
    params = [SamplingParams(seed=i, max_tokens=10) for i in range(4)]
    expected = [engine.generate([[i + 1]], params[i])[0].token_ids for i in range(4)]
    got: dict[int, tuple[int, ...]] = {}

    def work(i):
        got[i] = tuple(d.token_id for d in engine.stream([i + 1], params[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(4)] == expected
