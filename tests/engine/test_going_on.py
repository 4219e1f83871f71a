"""A request that goes on after tokens it got elsewhere; what running sequences do with their cache on new weights."""

import pytest
import torch
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams, StructuredOutputs
from glm5.engine.strict import strict_logprobs
from glm5.errors import InputError
from glm5.model import add_adapters

PROMPT = [5, 60, 7, 81, 9]


@pytest.fixture(scope="module")
def engine():
    return Engine(speaker_model(), speaker_tokenizer(), strict=True, block_size=4)


CASES = [
    SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=20, seed=3, ignore_eos=True, logprobs=2, n=3),
    SamplingParams(max_tokens=24, seed=4, min_tokens=20, frequency_penalty=1.5, repetition_penalty=1.2),
    SamplingParams(max_tokens=40, seed=5, stop=["a", "er"], ignore_eos=True),
    SamplingParams(max_tokens=40, seed=6, structured_outputs=StructuredOutputs(regex="[a-z]{3} is [0-9]{12}")),
]


def apart(deltas, n):
    """The tokens of each completion: which of them is first in a step is no promise."""
    return [[delta for delta in deltas if delta.index == i] for i in range(n)]


@pytest.mark.parametrize("params", CASES)
def test_a_request_goes_on_as_if_it_had_not_stopped(engine, params):
    whole = list(engine.stream(PROMPT, params))
    for cut in {1, 4, len(whole) // 2, len(whole) - 1, len(whole)}:
        rest = list(engine.stream(PROMPT, params, said=whole[:cut]))
        assert apart(rest, params.n) == apart(whole[cut:], params.n)
    assert engine.stats().running == engine.stats().waiting == engine.stats().blocks_used == 0


def test_completions_that_ended_stay_ended(engine):
    params = SamplingParams(max_tokens=9, seed=8, n=2, stop_token_ids=list(range(0, 320, 5)), ignore_eos=True)
    whole = list(engine.stream(PROMPT, params))
    first_end = next(i for i, delta in enumerate(whole) if delta.finish_reason)
    rest = list(engine.stream(PROMPT, params, said=whole[: first_end + 1]))
    assert apart(rest, 2) == apart(whole[first_end + 1 :], 2)


@pytest.mark.parametrize("most", [3, 2048])
def test_the_prompts_logprobs_are_complete_with_the_first_token_whoever_has_ended(most):
    """In pieces of three tokens, and at once; whether the first, another, all or none of the completions goes on."""
    engine = Engine(speaker_model(), speaker_tokenizer(), strict=True, block_size=4, max_num_batched_tokens=most)
    prompt = list(range(40, 57))
    params = SamplingParams(
        max_tokens=6, seed=8, n=3, prompt_logprobs=2, stop_token_ids=list(range(0, 320, 5)), ignore_eos=True
    )
    stream = engine.stream(prompt, params)
    whole, wanted = list(stream), stream.prompt_logprobs
    assert len(wanted) == len(prompt) and None not in wanted[1:]
    ends = [max(i for i, delta in enumerate(whole) if delta.index == index) for index in range(3)]
    assert len(set(ends)) == 3
    for ended in ((), (0,), (1,), (0, 2), (0, 1, 2)):
        said = [d for i, d in enumerate(whole) if d.index in ended or i < 3]
        rest = engine.stream(prompt, params, said=said)
        deltas = []
        for delta in rest:
            assert deltas or rest.prompt_logprobs == wanted
            deltas.append(delta)
        assert rest.prompt_logprobs == wanted
        assert apart(said + deltas, 3) == apart(whole, 3)
    assert engine.stats().running == engine.stats().waiting == engine.stats().blocks_used == 0
    engine.close()


def test_tokens_that_the_request_cannot_have_got_are_refused(engine):
    params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    whole = list(engine.stream(PROMPT, params))
    with pytest.raises(InputError, match="tokens after its end"):
        engine.stream(PROMPT, params, said=[*whole, whole[0]])
    with pytest.raises(InputError, match="n=1; give back"):
        engine.stream(PROMPT, params, said=list(engine.stream(PROMPT, SamplingParams(n=2, max_tokens=2))))


@pytest.mark.parametrize("recompute", [True, False])
def test_the_cache_is_kept_or_computed_anew_by_choice(recompute):
    """Anew: the next token's log-probability is exactly the new weights' own. Kept: it is neither model's."""
    engine = Engine(speaker_model(), speaker_tokenizer(), strict=True)
    new = speaker_model(seed=1)
    stream = engine.stream(PROMPT, SamplingParams(max_tokens=400, seed=1, ignore_eos=True))
    deltas = [next(stream) for _ in range(5)]
    engine.update_weights(1, new.state_dict(), recompute=recompute)
    deltas += list(stream)
    swap = next(i for i, delta in enumerate(deltas) if delta.version == 1)
    assert {d.version for d in deltas[:swap]} == {0} and {d.version for d in deltas[swap:]} == {1}
    exact = strict_logprobs(new, PROMPT + [d.token_id for d in deltas[: swap + 1]])[-1].item()
    assert (deltas[swap].logprob == exact) is recompute
    engine.close()


def test_adapters_alone_are_taken():
    def adapted(seed):
        model = speaker_model()
        add_adapters(model, rank=2)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model

    engine, wanted = Engine(adapted(1), speaker_tokenizer()), Engine(adapted(2), speaker_tokenizer())
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    before = engine.generate([PROMPT], params)[0].token_ids
    adapters = {name: tensor for name, tensor in adapted(2).state_dict().items() if "lora_" in name}
    engine.update_weights(1, adapters)
    after = engine.generate([PROMPT], params)[0].token_ids
    assert after == wanted.generate([PROMPT], params)[0].token_ids != before
    with pytest.raises(InputError, match="lack"):
        engine.update_weights(2, dict(list(adapters.items())[1:]))
    engine.close()
    wanted.close()
