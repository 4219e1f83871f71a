"""Structured output: untrained models write what the structure asks for, and bad or hostile structures are refused."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speaker import speaker_config, speaker_model, speaker_tokenizer

from glm5 import parse_assistant
from glm5.engine import SamplingParams, StructuredOutputs
from glm5.engine import grammar as grammar_module
from glm5.engine.grammar import GrammarCompiler, vocabulary_of
from glm5.engine.token_sampler import TokenSampler
from glm5.errors import InputError
from glm5.model import LatentCache

TOOL = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
TOOL_CALL = """
start: /[^<]{0,12}/ </think> call
call: <tool_call> "get_weather" city days </tool_call>
city: <arg_key> "city" </arg_key> <arg_value> /[^<]{1,8}/ </arg_value>
days: <arg_key> "days" </arg_key> <arg_value> %json {"type": "integer", "minimum": 1, "maximum": 14} </arg_value>
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"enum": ["small", "large"]},
        "numbers": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 99}, "maxItems": 3},
        "more": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                 "additionalProperties": False},
    },
    "required": ["name", "size", "numbers", "more"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiler():
    tokenizer = speaker_tokenizer()
    found = GrammarCompiler(tokenizer, speaker_config().vocab_size + 8, tokenizer.eos_ids)
    yield found
    found.close()


@torch.inference_mode()
def written(compiler, outputs: StructuredOutputs, seed: int, temperature: float = 1.5, most: int = 400) -> list[int]:
    """What a random model writes under a structure, token by token."""
    model = speaker_model(seed)
    cache = LatentCache(model.config, batch=1, capacity=most)
    params = SamplingParams(temperature=temperature)
    sampler = TokenSampler(params, [5, 6], seed=seed, grammar=compiler.compile(outputs))
    ids, fed = [5, 6], [5, 6]
    while not sampler.complete:
        logits_V = model(torch.tensor([fed]), cache=cache, logits_to_keep=1).logits[0, -1]
        padded_V = torch.nn.functional.pad(logits_V, (0, 8), value=50.0)  # ids beyond the tokenizer's are never allowed
        fed = [sampler.sample(padded_V, len(ids)).token_id]
        sampler.accept(fed[0])
        ids += fed
    return ids[2:]


@pytest.mark.parametrize("seed", range(4))
def test_an_untrained_model_writes_a_valid_object(compiler, seed):
    text = speaker_tokenizer().decode(written(compiler, StructuredOutputs(json=SCHEMA), seed))
    jsonschema.validate(json.loads(text), SCHEMA)
    assert not re.search(r"\s{33}", text)


@pytest.mark.parametrize("seed", range(4))
def test_an_untrained_model_writes_a_valid_tool_call(compiler, seed):
    tokenizer = speaker_tokenizer()
    ids = written(compiler, StructuredOutputs(grammar=TOOL_CALL), seed)
    for tag in ("</think>", "<tool_call>", "</tool_call>"):
        assert ids.count(tokenizer.token_to_id(tag)) == 1  # the token itself, not its characters
    assert ids[-1] == tokenizer.token_to_id("</tool_call>")  # and it ended there
    message = parse_assistant(tokenizer.decode(ids), tools=[TOOL], thinking=True)
    (call,) = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == "get_weather"
    assert list(arguments) == ["city", "days"] and 1 <= arguments["days"] <= 14 and arguments["city"]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_regex_and_choice(compiler, temperature):
    tokenizer = speaker_tokenizer()
    for seed in range(3):
        text = tokenizer.decode(written(compiler, StructuredOutputs(regex="[a-f]{3}-[0-9]{2,4}"), seed, temperature))
        text = text.removesuffix("<|endoftext|>").removesuffix("<|user|>").removesuffix("<|observation|>")
        assert re.fullmatch("[a-f]{3}-[0-9]{2,4}", text)
        choices = ("yes", "no", 'a "quoted"\n\\ one', "Straße")
        assert tokenizer.decode(written(compiler, StructuredOutputs(choice=choices), seed, temperature)) in choices


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=4))
def test_any_text_can_be_a_choice(compiler, choices):
    tokenizer = speaker_tokenizer()
    for choice in choices:
        state = compiler.compile(StructuredOutputs(choice=choices))
        for token in tokenizer.encode(choice, allow_special=False):
            assert state.allowed()[token]
            state.accept(token)
        assert state.complete or state.allowed()[list(tokenizer.eos_ids)].all()


def test_the_end_is_allowed_exactly_where_the_structure_may_end(compiler):
    tokenizer = speaker_tokenizer()
    eos = list(tokenizer.eos_ids)
    state = compiler.compile(StructuredOutputs(regex="ab*"))
    assert np.flatnonzero(state.allowed()).tolist() == tokenizer.encode("a")
    state.accept(tokenizer.encode("a")[0])
    assert set(eos) | set(tokenizer.encode("b")) <= set(np.flatnonzero(state.allowed()).tolist())
    assert not state.complete
    state.accept(eos[1])
    assert state.complete


def test_rollback_returns_to_the_state_before(compiler):
    state, ids = compiler.compile(StructuredOutputs(json=SCHEMA)), speaker_tokenizer().encode('{"name": "x", "size')
    masks = []
    for token in ids:
        masks.append(state.allowed())
        state.accept(token)
    for count in (1, 3, len(ids) - 4):
        state.rollback(count)
        del ids[len(ids) - count :]
        assert np.array_equal(state.allowed(), masks[len(ids)])
    with pytest.raises(InputError, match=r"does not fit the structure|cannot go on"):
        state.accept(5)


def test_min_tokens_does_not_forbid_the_only_end(compiler):
    tokenizer = speaker_tokenizer()
    grammar = compiler.compile(StructuredOutputs(regex="a(<end>)?"))
    sampler = TokenSampler(SamplingParams(min_tokens=9), [1], seed=0, stop_ids=set(tokenizer.eos_ids), grammar=grammar)
    sampler.accept(tokenizer.encode("a")[0])
    flat_V = torch.zeros(speaker_config().vocab_size + 8)
    assert (sampler.adjusted(flat_V)[list(tokenizer.eos_ids)] == -torch.inf).all()  # "<" can follow
    only = compiler.compile(StructuredOutputs(grammar="start: <|user|>"))
    ended = TokenSampler(SamplingParams(min_tokens=9), [1], seed=0, stop_ids=set(tokenizer.eos_ids), grammar=only)
    assert ended.sample(flat_V, 1).token_id == tokenizer.token_to_id("<|user|>")


def test_a_structure_is_compiled_once_and_the_kept_are_bounded(compiler, monkeypatch):
    compiled = []
    original = compiler._compiled
    monkeypatch.setattr(
        compiler, "_compiled", lambda outputs, wanted: compiled.append(outputs.text) or original(outputs, wanted)
    )
    monkeypatch.setattr(grammar_module, "KEPT", 3)
    first = compiler.compile(StructuredOutputs(regex="kept-0"))
    first.accept(speaker_tokenizer().encode("k")[0])
    second = compiler.compile(StructuredOutputs(regex="kept-0"))
    assert compiled == ["kept-0"]
    assert second.allowed()[speaker_tokenizer().encode("k")[0]]  # a state of its own, at the beginning
    for i in (1, 2, 3, 0):
        compiler.compile(StructuredOutputs(regex=f"kept-{i}"))
    assert compiled == ["kept-0", "kept-1", "kept-2", "kept-3", "kept-0"]
    assert [text for _, text in compiler._kept] == ["kept-2", "kept-3", "kept-0"]


DEEP_TERMS = "start: T0\n" + "\n".join(f'T{i}: "x" T{i + 1}' for i in range(4000)) + '\nT4000: "a"'


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [({"json": {"type": "strin"}}, "json cannot be used: Invalid type: strin"), ({"regex": "("}, "unclosed group"),
     ({"json": {"$ref": "#"}}, "json cannot be used"), ({"choice": ["a\ud800"]}, "choice cannot be used"),
     ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "Unsatisfiable"),
     ({"json": '{"items":' * 5000 + "{}" + "}" * 5000}, r"flatter|recursion"),
     ({"grammar": "start: no"}, 'unknown name: "no"'), ({"grammar": "start: <no>"}, "unknown special token"),
     ({"grammar": "start: " + "(" * 5000}, "too deeply nested"), ({"grammar": DEEP_TERMS}, "nested too deeply")],
)  # fmt: skip
def test_structures_that_cannot_be_used_are_refused_with_the_reason(compiler, outputs, sentence):
    with pytest.raises(InputError, match=sentence):
        compiler.compile(StructuredOutputs(**outputs))
    state = compiler.compile(StructuredOutputs(regex="still here"))
    assert state.allowed().sum() == 1


def test_refusals_are_kept_for_a_while_and_bounded(compiler, monkeypatch):
    compiled, now = [], [100.0]
    original = compiler._compiled
    monkeypatch.setattr(
        compiler, "_compiled", lambda outputs, wanted: compiled.append(outputs.text) or original(outputs, wanted)
    )
    monkeypatch.setattr(grammar_module, "KEPT", 2)
    monkeypatch.setattr(grammar_module.time, "monotonic", lambda: now[0])

    def refused(text):
        with pytest.raises(InputError, match="unclosed group"):
            compiler.compile(StructuredOutputs(regex=text))
        assert compiler.has(StructuredOutputs(regex=text))

    for text in ("(a", "(a", "(b", "(c", "(c", "(a"):  # the first is forgotten when the third comes
        refused(text)
    assert compiled == ["(a", "(b", "(c", "(a"] and len(compiler._refused) == 2
    now[0] += grammar_module.REFUSED_SECONDS
    assert not compiler.has(StructuredOutputs(regex="(a"))
    refused("(a")
    assert compiled[4:] == ["(a"]


def test_who_asks_for_a_kept_grammar_does_not_wait_for_a_new_one(monkeypatch):
    tokenizer = speaker_tokenizer()
    compiler = GrammarCompiler(tokenizer, speaker_config().vocab_size, tokenizer.eos_ids)
    compiler.compile(StructuredOutputs(regex="a"))
    begun, go_on = threading.Event(), threading.Event()
    compiled = compiler._compiled

    def slowly(outputs, wanted):
        begun.set()
        assert go_on.wait(60)
        return compiled(outputs, wanted)

    monkeypatch.setattr(compiler, "_compiled", slowly)
    with ThreadPoolExecutor(2) as threads:
        twice = [threads.submit(compiler.compile, StructuredOutputs(regex="b")) for _ in range(2)]
        begun.wait()
        assert compiler.compile(StructuredOutputs(regex="a")).allowed().sum() == 1
        monkeypatch.setattr(compiler, "_compiled", compiled)
        go_on.set()
        assert all(state.result().allowed().sum() == 1 for state in twice)
    compiler.close()


SPELLED = "a value that is long and then <|user|> tail"


@pytest.mark.parametrize(
    ("outputs", "texts"),
    [({"choice": ["a<think>b", "c"]}, ["a<think>b", "c"]), ({"choice": ["<|user|>"]}, ["<|user|>"]),
     ({"regex": r"x<\|user\|>y"}, ["x<|user|>y"]), ({"json": {"const": SPELLED}}, [f'"{SPELLED}"']),
     ({"json": {"const": "<think>"}}, ['"<think>"']), ({"json": {"enum": ["<think>"]}}, ['"<think>"']),
     ({"json": {"type": "object", "properties": {"<think>": {"const": 1}, SPELLED: {"const": True}},
                "required": ["<think>", SPELLED], "additionalProperties": False}}, None)],
)  # fmt: skip
def test_structures_that_hold_the_text_of_an_added_token_spell_it(compiler, outputs, texts):
    tokenizer = speaker_tokenizer()
    for seed in range(3):
        ids = written(compiler, StructuredOutputs(**outputs), seed)
        text = tokenizer.decode(ids)
        assert not set(ids) & set(tokenizer.backend.get_added_tokens_decoder())
        assert json.loads(text) == {"<think>": 1, SPELLED: True} if texts is None else text in texts


def test_a_grammar_tells_a_token_from_its_spelling(compiler):
    tokenizer = speaker_tokenizer()
    named = [tokenizer.special_ids[token] for token in ("<think>", "</think>")]
    ids = written(compiler, StructuredOutputs(grammar='start: "a<think>" <think> "b</think>" </think>'), 0)
    assert [token for token in ids if token in tokenizer.special_ids.values()] == named
    assert tokenizer.decode(ids) == "a<think><think>b</think></think>"


def test_the_vocabulary_is_the_one_that_llguidance_reads_from_the_tokenizers_file(compiler):
    tokenizer, size = speaker_tokenizer(), speaker_config().vocab_size + 8
    vocabulary = vocabulary_of(tokenizer, size, list(tokenizer.eos_ids))
    ours = vocabulary.tokenizer()
    theirs = llguidance.LLTokenizer(vocabulary.tokenizer_json, n_vocab=size, eos_token=vocabulary.eos_ids)
    assert ours.vocab_size == theirs.vocab_size == size and ours.is_canonical
    for token in range(size):
        assert ours.is_special_token(token) == theirs.is_special_token(token)
        assert ours.decode_bytes([token]) == theirs.decode_bytes([token])
    for text in ("plain text, 12 + 30", "你好 wörld\n\n  x"):
        assert ours.tokenize_str(text) == theirs.tokenize_str(text) == tokenizer.backend.encode(text).ids


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [({}, "has none; give exactly one"), ({"json": {}, "regex": "a"}, "has json and regex; give exactly one"),
     ({"json": "{"}, "is not JSON"), ({"json": [1]}, "an object or a boolean"), ({"json": {"a": {1}}}, "is not JSON"),
     ({"json": {"minimum": float("nan")}}, "is not JSON"), ({"regex": ""}, "at least one character"),
     ({"grammar": 5}, "grammar is 5"), ({"choice": "yes"}, "give a list"), ({"choice": []}, "is empty"),
     ({"choice": ["a", ""]}, "holds ''"), ({"regex": "a" * 300_000}, "has 300,000 bytes; at most 262,144")],
)  # fmt: skip
def test_malformed_structures_are_refused_when_they_are_made(outputs, sentence):
    with pytest.raises(InputError, match=sentence):
        StructuredOutputs(**outputs)
