"""Speculation changes no token and no bit; what it drafts is what the MTP module says without any cache."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_sampler import chi_square_limit
from tiny import tiny_model

from glm5.engine import Engine, SamplingParams
from glm5.engine.paged_cache import PagedCache
from glm5.engine.runner import Chunk, Runner
from glm5.engine.sequence import Sequence
from glm5.engine.speculative import Speculator
from glm5.errors import InputError

PROMPTS = [[5, 6, 7, 8, 9], list(range(20, 34))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.6, max_tokens=40, ignore_eos=True, seed=3)


class Always:
    """A pace that always drafts."""

    def wanted(self, sequences):
        return True

    def took(self, *measured):
        pass


def agreeing_model(seed: int = 0, mixing: float = 0.05, **changes) -> torch.nn.Module:
    """A tiny model whose MTP module often guesses right: both depend mostly on the last token.

    The layers' outputs are scaled down, and the module hands the embedding of the next token through.
    """
    model = tiny_model(seed, **changes)
    with torch.no_grad():
        for layer in [*model.model.layers, *model.mtp]:
            for name, weight in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    weight.mul_(mixing)
        width = model.config.hidden_size
        projection = model.mtp[0].eh_proj.weight
        projection.mul_(mixing)
        projection[:, :width] += torch.eye(width)
    return model


def drafting_engine(model, k, **settings) -> Engine:
    settings = {"strict": True, "block_size": 4, "num_blocks": 400, **settings}
    engine = Engine(model, num_speculative_tokens=k, **settings)
    if k:
        engine._core.speculator.pace = Always()
    return engine


@torch.inference_mode()
def drafts_without_cache(model, tokens: list[int], params, k: int, sampler) -> list[int]:
    """What the module drafts behind `tokens`, everything computed from the first token."""
    hidden_TD = model(torch.tensor([tokens[:-1]]), collect={"hidden"}).hidden[0]
    next_ids, drafts = tokens[1:], []
    for _ in range(k):
        states_BTD, logits_BTV = model.draft(hidden_TD[None], torch.tensor([next_ids]))
        drafts.append(sampler.choose(logits_BTV[0, -1], len(tokens) + len(drafts)))
        hidden_TD = torch.cat((hidden_TD, states_BTD[0, -1:]))
        next_ids = [*next_ids, drafts[-1]]
    return drafts


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_drafts_over_the_cache_are_those_without_a_cache(params):
    """After rejections, over block boundaries and far above index_topk (8): wrong rows would only lower acceptance."""
    model = agreeing_model()
    cache = PagedCache(model.config, num_blocks=32, block_size=4, draft=True)
    runner, table = Runner(model, cache), [7, 3, 30, 0, 11, 12, 25, 9, 1, 2, 5, 6, 8, 10]
    speculator = Speculator(runner, drafts=3, block_size=4, max_model_len=56, pace=Always())
    sequence = Sequence(
        tuple(PROMPTS[0]), params, index=0, seed=3, max_tokens=43, eos_ids=frozenset(), detokenizer=None
    )
    sequence.table, seen = table, Counter()
    while not sequence.done:
        start, drafts = sequence.computed, sequence.drafts
        chunk = Chunk([*sequence.token_ids[start:], *drafts], start, table, len(drafts) + 1)
        logits_KV = speculator.run([chunk])[0].logits_KV
        accepted = 0
        for i in range(len(drafts) + 1):
            delta = sequence.append(sequence.sample(logits_KV[i]), 0)
            if sequence.done or i == len(drafts) or drafts[i] != delta.token_id:
                break
            accepted += 1
        seen[accepted] += 1
        sequence.computed, sequence.drafts = start + len(chunk.token_ids) - len(drafts) + accepted, []
        speculator.follow(sequence, start, speculator._states[0])
        speculator.draft([sequence], wanted=True)
        if not sequence.done:
            k = min(3, 42 - len(sequence.deltas))
            assert len(sequence.drafts) == k
            assert sequence.drafts == drafts_without_cache(model, sequence.token_ids, params, k, sequence.sampler)
    assert len(seen) > 2  # of the drafts none, some and all were right


@pytest.mark.parametrize(
    ("k", "changes"),
    [(1, {"temperature": 0.0}), (4, {}), (2, {"n": 3, "logprobs": 2, "top_p": 0.9}),
     (3, {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {6: -50.0}, "min_tokens": 9,
          "stop_token_ids": [8]})],
)  # fmt: skip
def test_tokens_and_logprobs_are_the_same_to_the_bit(k, changes):
    model = agreeing_model()
    params = [replace(SAMPLED, seed=i, max_tokens=16, **changes) for i in range(2)]
    plain = drafting_engine(model, 0).generate(PROMPTS, params)
    engine = drafting_engine(model, k)
    assert engine.generate(PROMPTS, params) == plain
    assert 0 < engine.stats().accepted_tokens < engine.stats().drafted_tokens


def test_preemption_and_new_weights_change_nothing():
    model, other = agreeing_model(), agreeing_model(1)
    params = [replace(SAMPLED, seed=i, max_tokens=16) for i in range(2)]
    plain = drafting_engine(model, 0).generate(PROMPTS, params)
    tight = drafting_engine(model, 3, num_blocks=9)
    assert [o.token_ids for o in tight.generate(PROMPTS, params)] == [o.token_ids for o in plain]
    assert tight.stats().preemptions > 0 and tight.stats().accepted_tokens > 0
    tight._core.scheduler.check()

    engine = drafting_engine(model, 3)
    stream = engine.stream(PROMPTS[0], replace(SAMPLED, max_tokens=60))
    found = [next(stream)]
    engine.update_weights(5, other.state_dict())
    found += list(stream)
    first = next(i for i, delta in enumerate(found) if delta.version == 5)
    prompt = [*PROMPTS[0], *(delta.token_id for delta in found[:first])]
    (again,) = drafting_engine(other, 0).generate([prompt], replace(SAMPLED, max_tokens=60 - first))
    assert tuple(delta.token_id for delta in found[first:]) == again.token_ids
    assert tuple(delta.logprob for delta in found[first:]) == again.logprobs


def test_the_distribution_is_unchanged():
    """The first three tokens of many samples against the exact joint distribution, with drafts verified among them."""
    model = agreeing_model(2, vocab_size=5, mixing=0.3)
    engine = drafting_engine(model, 2, strict=False, block_size=16, num_blocks=2000)
    samples = 1250
    counts: Counter = Counter()
    for seed in range(samples // 250):
        output = engine.generate([[1, 2]], replace(SAMPLED, temperature=1.0, n=250, max_tokens=5, seed=seed))[0]
        counts.update(completion.token_ids[1:4] for completion in output.outputs)
    with torch.inference_mode():
        prefixes = torch.cartesian_prod(*[torch.arange(5)] * 4)
        ids = torch.cat((torch.tensor([[1, 2]]).expand(len(prefixes), 2), prefixes), dim=1)
        logprobs = model(ids).logits.double().log_softmax(-1)
        joint = sum(logprobs[:, 1 + j].gather(-1, prefixes[:, j : j + 1])[:, 0] for j in range(4)).exp()
    joint = joint.view(5, 125).sum(0).tolist()
    cells = [tuple(cell) for cell in torch.cartesian_prod(*[torch.arange(5)] * 3).tolist()]
    expected = {cell: samples * share for cell, share in zip(cells, joint, strict=True)}
    assert abs(sum(expected.values()) - samples) < 1e-6
    common = {cell: e for cell, e in expected.items() if e >= 5}
    rare = samples - sum(common.values())
    chi_square = sum((counts[cell] - e) ** 2 / e for cell, e in common.items())
    chi_square += (samples - sum(counts[cell] for cell in common) - rare) ** 2 / max(rare, 1e-9)
    assert chi_square < chi_square_limit(len(common))
    stats = engine.stats()
    assert stats.accepted_tokens > samples / 2 and stats.drafted_tokens > stats.accepted_tokens


def test_drafting_that_does_not_pay_stops_and_starts_again(monkeypatch):
    model = agreeing_model()
    engine = drafting_engine(model, 2)

    class Alternating(Always):
        calls = 0

        def wanted(self, sequences):
            self.calls += 1
            return self.calls // 7 % 2 == 1

    params = replace(SAMPLED, max_tokens=40)
    plain = drafting_engine(model, 0).generate(PROMPTS[:1], params)
    engine._core.speculator.pace = Alternating()
    monkeypatch.setattr("glm5.engine.speculative.HELD_STATES", 3)
    assert engine.generate(PROMPTS[:1], params) == plain
    assert engine.stats().accepted_tokens > 0


def test_refusals():
    with pytest.raises(InputError, match=r"num_speculative_tokens is 17; .* from 0 to 16"):
        Engine(agreeing_model(), num_speculative_tokens=17)
    with pytest.raises(InputError, match="has no MTP module to draft with"):
        Engine(tiny_model(num_nextn_predict_layers=0), num_speculative_tokens=1)
