"""A grammar that begins at a token: free before and behind it, and speculation changes nothing."""

import numpy as np
import pytest
from speaker import speaker_config, speaker_tokenizer
from test_speculation import agreeing_model, drafting_engine

from glm5 import parse_assistant
from glm5.engine import SamplingParams, StructuredOutputs
from glm5.engine.grammar import GrammarCompiler
from glm5.errors import InputError

VALUE = """{"type": "object", "properties": {"b": {"type": "string", "maxLength": 12}}, "required": ["b"],
"additionalProperties": false, "x-guidance": {"whitespace_flexible": false, "key_separator": ": ?"}}""".replace(
    "\n", ""
)
CALL = f'start: <tool_call> "f" <arg_key> "a" </arg_key> <arg_value> %json {VALUE} </arg_value> </tool_call>'
LAZY = StructuredOutputs(grammar=CALL, begins_at="<tool_call>", unspelled=["</arg_value>", "</tool_call>"])
WRITTEN = '<tool_call>f<arg_key>a</arg_key><arg_value>{"b": "</x"}</arg_value></tool_call>'
V = speaker_config().vocab_size + 8


@pytest.fixture(scope="module")
def compiler():
    tokenizer = speaker_tokenizer()
    found = GrammarCompiler(tokenizer, V, tokenizer.eos_ids)
    yield found
    found.close()


def test_outside_of_the_grammar_every_token_may_come(compiler):
    tokenizer, state = speaker_tokenizer(), compiler.compile(LAZY)
    for token in [*tokenizer.encode("a < b</think>"), *tokenizer.encode(f"{WRITTEN}x{WRITTEN}<|user|>")]:
        allowed = state.allowed()
        assert allowed is None or allowed[token]
        state.accept(token)
    assert state.allowed() is None and not state.complete
    state.accept(tokenizer.token_to_id("<tool_call>"))
    assert np.flatnonzero(state.allowed()).tolist() == tokenizer.encode("f")


def test_tags_are_not_spelled(compiler):
    tokenizer, state = speaker_tokenizer(), compiler.compile(LAZY)
    (closing,) = tokenizer.encode(">", allow_special=False)
    control = tokenizer.token_to_id("[MASK]")  # which a reader of the text does not see
    for token in [*tokenizer.encode("<<tool_call", allow_special=False), control]:
        state.accept(token)
    assert not state.allowed()[closing] and state.allowed().sum() == V - 1
    for token in [*tokenizer.encode("x"), *tokenizer.encode(WRITTEN.partition("</x")[0] + "</arg_value")]:
        state.accept(token)
    allowed = state.allowed()
    assert not allowed[closing] and allowed[tokenizer.encode("x")].all()


def test_rollback_returns_to_the_state_before(compiler):
    tokenizer, state = speaker_tokenizer(), compiler.compile(LAZY)
    ids, masks = tokenizer.encode(f"a <tool{WRITTEN}{WRITTEN}b"), []
    for token in ids:
        masks.append(state.allowed())
        state.accept(token)
    masks.append(state.allowed())
    for back in (1, 3, len(ids)):  # to the same place again and again
        state.rollback(back)
        for place in range(len(ids) - back, len(ids)):
            assert np.array_equal(state.allowed(), masks[place])
            state.accept(ids[place])
        assert np.array_equal(state.allowed(), masks[-1])


def test_a_token_that_is_refused_changes_nothing(compiler):
    state, begin = compiler.compile(LAZY), speaker_tokenizer().token_to_id("<tool_call>")
    fresh = state._fresh
    state._fresh = lambda: moved(fresh(), begin)
    with pytest.raises(InputError):
        state.accept(begin)
    assert state.allowed() is None and not state._before
    state._fresh = fresh
    state.accept(begin)
    assert state.allowed() is not None
    state.rollback(1)
    assert state.allowed() is None


def moved(state, token):
    state.accept(token)
    return state


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_speculation_changes_no_token(temperature):
    tokenizer, config = speaker_tokenizer(), speaker_config()
    model = agreeing_model(3, vocab_size=config.vocab_size, eos_token_id=tokenizer.eos_ids)
    params = SamplingParams(
        temperature=temperature, seed=5, max_tokens=160, ignore_eos=True, structured_outputs=LAZY,
        logit_bias=dict(zip(tokenizer.encode('<tool_call>"'), (60.0, 30.0), strict=True)),
    )  # fmt: skip
    said = []
    for drafts in (0, 4):
        engine = drafting_engine(model, drafts, tokenizer=tokenizer, num_blocks=64)
        (output,) = engine.generate([[5, 6, 7, 8]], params)
        said.append(output.token_ids)
        engine.close()
    assert said[0] == said[1] and said[0].count(tokenizer.token_to_id("</tool_call>")) > 1
    calls = parse_assistant(output.text, thinking=False)["tool_calls"]
    assert {call["function"]["name"] for call in calls} == {"f"}


def test_a_grammar_of_the_whole_spells_no_tag_either(compiler):
    tokenizer = speaker_tokenizer()
    state = compiler.compile(StructuredOutputs(grammar=CALL, unspelled=["</arg_value>"]))
    written = tokenizer.encode('<tool_call>f<arg_key>a</arg_key><arg_value>{"b": "</arg_value')
    (closing,) = tokenizer.encode(">", allow_special=False)
    for token in written:
        assert state.allowed()[token]
        state.accept(token)
    assert not state.allowed()[closing] and not state.complete
    state.rollback(1)
    state.accept(written[-1])
    assert not state.allowed()[closing]
    state.rollback(2)
    assert state.allowed()[closing]
    for token in tokenizer.encode('"}</arg_value></tool_call>'):
        state.accept(token)
    assert state.complete


def test_where_nothing_else_is_left_a_tag_is_spelled(compiler):
    tokenizer = speaker_tokenizer()
    state = compiler.compile(StructuredOutputs(grammar=r"start: /<\/thin(k|g)>/", unspelled=("</think>",)))
    for token in tokenizer.encode("</think>", allow_special=False):
        assert state.allowed()[token]
        state.accept(token)
    assert state.complete


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"regex": "a", "unspelled": ["</think>"]}, "belongs to a grammar"),
        ({"grammar": CALL, "unspelled": [5]}, "belongs to a grammar"),
        ({"grammar": CALL, "unspelled": ["</no>"]}, "'</no>', which is no added token"),
    ],
)
def test_what_is_no_tag_is_refused(compiler, given, sentence):
    with pytest.raises(InputError, match=sentence):
        compiler.compile(StructuredOutputs(**given))


@pytest.mark.parametrize("begins_at", ["<tool_response>", "<no>", "tool", "</tool_call>"])
def test_what_begins_no_grammar_is_refused(compiler, begins_at):
    with pytest.raises(InputError, match="name the added token that begins the grammar"):
        compiler.compile(StructuredOutputs(grammar=CALL, begins_at=begins_at))


@pytest.mark.parametrize("given", [{"regex": "a", "begins_at": "<tool_call>"}, {"grammar": CALL, "begins_at": 5}])
def test_it_belongs_to_a_grammar(given):
    with pytest.raises(InputError, match="belongs to a grammar"):
        StructuredOutputs(**given)
