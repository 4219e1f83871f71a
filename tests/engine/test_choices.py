"""The experts that an engine reports are those that the plain model chooses on the same tokens, however they came."""

from dataclasses import replace

import numpy as np
import pytest
from chosen_experts import ordered, plain
from decoding_steps import needs_extension
from hypothesis import given
from hypothesis import strategies as st
from speaker import ScriptedModel
from test_speculation import agreeing_model, drafting_engine
from tiny import tiny_model

from glm5.engine import Engine, ExpertChoices, SamplingParams
from glm5.engine.choices import ChoicePool, SequenceChoices, joined
from glm5.errors import InputError
from glm5.model.fast_steps import FastSteps

ROOT = list(range(20, 60))
PROMPTS = [ROOT[:3], ROOT, ROOT[:30], [*ROOT, 7], [9]]
ASKED = SamplingParams(max_tokens=12, seed=3, ignore_eos=True, experts_from=0)
SILENT = replace(ASKED, experts_from=None)


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=3)


@pytest.fixture(params=[pytest.param(True, marks=needs_extension), False], ids=["decoder", "modules"])
def decoder(request, monkeypatch):
    """Whether decoders run, or the modules alone."""
    if not request.param:
        monkeypatch.setattr(FastSteps, "exact_decoder", lambda *arguments: None)


def check(model, output):
    """Of every completion."""
    for completion in output.outputs:
        ids = [*output.prompt_token_ids, *completion.token_ids]
        assert completion.experts.start == 0 and completion.experts.array.dtype == np.uint8
        np.testing.assert_array_equal(ordered(completion.experts), plain(model, ids))


# ---- the record itself --------------------------------------------------------------------------------------------
def some(start, tokens, seed=0, number=np.uint8):
    return ExpertChoices.of(start, np.random.default_rng(seed).integers(0, 200, (tokens, 2, 3)).astype(number))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 5), st.sampled_from([np.uint8, np.uint16]))
def test_parts_join_to_the_whole(lengths, start, number):
    whole, parts, at = some(start, sum(lengths), number=number), [], start
    for length in lengths:
        parts.append(whole.part(at, at + length))
        assert (parts[-1].start, len(parts[-1])) == (at, length)
        at += length
    assert joined([None, *parts, None]) == whole and whole.end == at
    assert joined([whole, some(start, sum(lengths), seed=1, number=number)]) == whole  # the first to tell counts
    np.testing.assert_array_equal(whole.part(start + 1).array, whole.array[1:])


def test_gaps_and_other_models_are_refused():
    assert joined([]) is None and joined([None]) is None
    with pytest.raises(ValueError, match="end at token 4 and go on at 5"):
        joined([some(0, 4), some(5, 1)])
    with pytest.raises(ValueError, match="of 1 layers follow those of 2"):
        joined([some(0, 4), ExpertChoices.of(4, np.zeros((1, 1, 3), np.uint8))])


def test_a_pool_gives_what_lies_in_the_blocks_and_moves_with_them():
    pool, rows = ChoicePool(8, 4), some(0, 10).array
    pool.record(SequenceChoices(0), [5, 2, 7], 0, rows[:6])
    pool.record(SequenceChoices(6), [5, 2, 7], 6, rows[6:])
    pool.copy([(2, 3)])
    found = SequenceChoices(0)
    pool.record(found, [5, 3, 1], 8, rows[8:9])  # the first two blocks were found
    assert found.take(10) == ExpertChoices.of(0, rows[:9])
    late = SequenceChoices(7)
    pool.record(late, [5, 3, 1], 8, rows[8:9])
    assert late.take(8) == ExpertChoices.of(7, rows[7:8]) and late.take(9) == ExpertChoices.of(8, rows[8:9])


def test_what_was_told_stays_and_what_is_forgotten_is_computed_again():
    choices, first, second = SequenceChoices(0), some(0, 6), some(0, 6, seed=1)
    choices.add(first.part(0, 4))
    assert choices.take(3) == first.part(0, 3) and choices.take(3) is None
    choices.forget()
    choices.add(second)
    assert choices.take(6) == second.part(3)


# ---- the engine ---------------------------------------------------------------------------------------------------
CUTS = {
    "batch": {"block_size": 8},
    "chunks": {"block_size": 8, "max_num_batched_tokens": 7},
    "small blocks, preemption": {"block_size": 4, "num_blocks": 18},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_seqs": 3},
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "fast"])
@pytest.mark.parametrize("cut", CUTS)
def test_they_are_the_models_however_a_sequence_is_computed(model, cut, strict, decoder):
    engine = Engine(model, strict=strict, **CUTS[cut])
    params = [ASKED, replace(ASKED, n=3), ASKED, replace(SILENT, seed=4), ASKED]
    silent = engine.generate(PROMPTS, [replace(p, experts_from=None) for p in params])  # its blocks are of no use
    before = engine.stats().cached_tokens
    for _ in range(2):  # computed, and then found
        outputs = engine.generate(PROMPTS, params)
        assert [[c.token_ids for c in o.outputs] for o in outputs] == [[c.token_ids for c in o.outputs] for o in silent]
        assert outputs[3].experts is None and silent[0].experts is None
        for output in (outputs[i] for i in (0, 1, 2, 4)):
            check(model, output)
    if "num_blocks" in CUTS[cut]:
        assert engine.stats().preemptions > 0
    assert (engine.stats().cached_tokens > before) == (cut != "no prefix cache")
    engine.close()


def test_a_prefix_is_found_only_where_its_experts_are_kept(model):
    engine = Engine(model, block_size=4)
    engine.generate([ROOT], SILENT)
    first, second = (engine.generate([[*ROOT, more]], ASKED)[0] for more in (1, 2))
    assert first.cached_tokens == 0 and second.cached_tokens == 40
    check(model, second)
    third = engine.generate([[*ROOT, 2, 3]], replace(ASKED, experts_from=38))[0]
    assert third.cached_tokens == 40 and third.experts.start == 38
    ids = [*third.prompt_token_ids, *third.token_ids]
    np.testing.assert_array_equal(ordered(third.experts), plain(model, ids)[38:])
    assert engine.generate([[*ROOT, 2, 3]], SILENT)[0].cached_tokens == 40
    engine.close()


def test_blocks_that_forks_copied_are_found_with_their_experts(model):
    engine = Engine(model, block_size=8)
    (output,) = engine.generate([ROOT[:12]], replace(ASKED, n=3))  # the second block is shared, then copied
    for completion in output.outputs:
        (longer,) = engine.generate([[*ROOT[:12], *completion.token_ids]], ASKED)
        assert longer.cached_tokens == 16
        check(model, longer)
    for output in engine.generate([ROOT[:5], ROOT], replace(ASKED, n=3, max_tokens=1)):
        check(model, output)
    engine.close()


def test_each_token_brings_what_none_before_it_brought(model):
    engine = Engine(model, block_size=4, max_num_batched_tokens=16)
    deltas = list(engine.stream(ROOT, ASKED))
    assert [len(delta.experts) for delta in deltas] == [40] + [1] * 11
    assert [delta.experts.end for delta in deltas] == list(range(40, 52))
    for cut in (1, 5):  # and a request that goes on elsewhere brings the rest
        rest = list(engine.stream(ROOT, ASKED, said=deltas[:cut]))
        assert rest == deltas[cut:]
    without = [replace(delta, experts=None) for delta in deltas[:5]]
    assert next(engine.stream(ROOT, ASKED, said=without)).experts == joined(d.experts for d in deltas[:6])
    late = list(engine.stream(ROOT, replace(ASKED, experts_from=43)))
    assert [delta.experts and len(delta.experts) for delta in late] == [None] * 4 + [1] * 8
    engine.close()


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "fast"])
def test_drafts_that_were_right_count_and_wrong_ones_do_not(strict, decoder):
    model = agreeing_model(num_hidden_layers=3)
    engine = drafting_engine(model, 3, strict=strict)
    params = [replace(ASKED, temperature=0.6, seed=i, max_tokens=30, n=1 + i) for i in range(2)]
    for output in engine.generate([ROOT[:5], ROOT[:14]], params):
        check(model, output)
    assert 0 < engine.stats().accepted_tokens < engine.stats().drafted_tokens
    engine.close()


@pytest.mark.parametrize("recompute", [True, False])
def test_new_weights_inside_a_sequence(model, recompute, decoder):
    """A token's experts are those of the weights that sampled the one after it, whatever is computed again later."""
    new = tiny_model(1, num_hidden_layers=3)
    engine = Engine(tiny_model(num_hidden_layers=3), strict=True, block_size=4, threaded=False)
    stream = engine.stream(ROOT[:9], replace(ASKED, max_tokens=30))
    deltas = []
    for _ in range(10):
        engine.step()
        deltas.append(stream.poll())
    engine.update_weights(1, new.state_dict(), recompute=recompute)
    while engine.step():
        deltas.append(stream.poll())
    ids = [*ROOT[:9], *(delta.token_id for delta in deltas)]
    assert [delta.version for delta in deltas] == [0] * 10 + [1] * 20
    found = ordered(joined(delta.experts for delta in deltas))
    np.testing.assert_array_equal(found[:18], plain(model, ids)[:18])
    if recompute:
        np.testing.assert_array_equal(found[18:], plain(new, ids)[18:])
    else:  # over rows of the old weights they are neither model's
        assert (found[18:] != plain(model, ids)[18:]).any()


@pytest.mark.parametrize("recompute", [True, False])
def test_new_weights_inside_a_prompt(model, recompute):
    """Its experts are those of the rows that lie in the cache when the first token is sampled."""
    new = tiny_model(1, num_hidden_layers=3)
    engine = Engine(
        tiny_model(num_hidden_layers=3), strict=True, block_size=4, max_num_batched_tokens=16, threaded=False
    )
    stream = engine.stream(ROOT, replace(ASKED, max_tokens=1))
    engine.step()
    engine.update_weights(1, new.state_dict(), recompute=recompute)
    while engine.step():
        pass
    found, ids = ordered(stream.poll().experts), [*ROOT, 0]
    if recompute:
        np.testing.assert_array_equal(found, plain(new, ids))
    else:
        np.testing.assert_array_equal(found[:16], plain(model, ids)[:16])
        assert (found[16:] != plain(model, ids)[16:]).any()


def test_who_cannot_tell_refuses():
    engine = Engine(ScriptedModel("Hello."))
    with pytest.raises(InputError, match="needs engines of this program"):
        engine.generate([[5, 6]], ASKED)
    with pytest.raises(InputError, match="experts_from"):
        SamplingParams(experts_from=-1)
