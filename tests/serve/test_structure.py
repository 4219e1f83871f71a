"""Forced calls and response formats: a model with random weights answers in the form that it is asked for."""

import json

import jsonschema
import pytest
from chat_client import ADD, USER, ask, client_of
from speaker import speaker_model

from glm5.errors import InputError
from glm5.serve.structure import Structure, answer_schema
from glm5.serve.tool_rules import call_rules

BOOK = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["c", "f", ""]},
        "days": {"type": "integer"},
        "share": {"type": "number", "minimum": 0, "maximum": 5},
        "options": {
            "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
            "additionalProperties": False,
        },
        "list": {"type": "array", "items": {"$ref": "#/$defs/digit"}, "maxItems": 3},
        "code": {"anyOf": [{"type": "string", "pattern": "^[a-z]{2}/x$"}, {"type": "null"}]},
        "note": {"type": ["string", "null"], "maxLength": 3},
    },
    "required": ["city", "unit", "options", "code"],
    "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "book", "parameters": BOOK}},
    {"type": "function", "function": {"name": "no.arguments", "parameters": {"type": "object", "properties": {}}}},
]
POINT = {
    "type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["x", "on"], "additionalProperties": False,
}  # fmt: skip
THINKING = [{}, {"chat_template_kwargs": {"enable_thinking": False}}]


@pytest.fixture(scope="module")
def client():
    return client_of(model=speaker_model(positions=4096))


def short(**fields):
    """Room for an answer behind the reasoning, of which a random model makes as much as it may."""
    return {"messages": [{"role": "user", "content": "?"}], "max_tokens": 160, **fields}


def choice_of(client, **fields):
    response = ask(client, **short(**fields))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.mark.parametrize("thinking", THINKING)
def test_a_forced_call_is_valid_whatever_the_weights(client, thinking):
    ended = 0
    named = {"type": "function", "function": {"name": "book"}}
    for seed in range(2):
        choice = choice_of(client, tools=TOOLS[:1], tool_choice=named, seed=seed, max_tokens=600, **thinking)
        if choice["finish_reason"] == "length":  # cut by max_tokens: then it says so
            continue
        ended += 1
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert call["function"]["name"] == "book"
        jsonschema.validate(json.loads(call["function"]["arguments"]), BOOK)
    assert ended


def test_required_means_some_call_and_one_when_calls_are_not_parallel(client):
    counts = set()
    for seed in range(6):
        fields = {"tools": TOOLS[1:], "tool_choice": "required", "seed": seed, **THINKING[1]}
        choice = choice_of(client, **fields)
        counts.add(len(choice["message"]["tool_calls"]))
        assert {call["function"]["name"] for call in choice["message"]["tool_calls"]} == {"no.arguments"}
        assert len(choice_of(client, parallel_tool_calls=False, **fields)["message"]["tool_calls"]) == 1
    assert max(counts) > 1


@pytest.mark.parametrize("thinking", THINKING)
def test_a_response_format_holds(client, thinking):
    named = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}
    for seed in range(2):
        choice = choice_of(client, response_format=named, seed=seed, **thinking)
        jsonschema.validate(json.loads(choice["message"]["content"]), POINT)
        assert (choice["message"]["reasoning_content"] is not None) == (thinking == {})
        assert choice["finish_reason"] == "stop"


def test_a_format_beside_tools_allows_either(client):
    named = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
    kinds = set()
    for seed in range(12):
        message = choice_of(client, response_format=named, tools=TOOLS[1:], seed=seed, **THINKING[1])["message"]
        kinds.add("calls" if message.get("tool_calls") else "answer")
        assert message.get("tool_calls") or jsonschema.validate(json.loads(message["content"]), POINT) is None
    assert kinds == {"calls", "answer"}


@pytest.mark.parametrize("thinking", THINKING)
def test_structured_outputs_as_vllm_spells_them(client, thinking):
    """With thinking on they hold for what stands behind the reasoning."""
    for given, allowed in (
        ({"choice": ["red", 'a "b"']}, {"red", 'a "b"'}), ({"regex": "[/]ab{2}"}, {"/abb"}),
        ({"json": {"const": 7}}, {"7"}),
    ):  # fmt: skip
        message = choice_of(client, structured_outputs=given, **thinking)["message"]
        assert message["content"] in allowed
        assert (message["reasoning_content"] is not None) == (thinking == {})
    written = choice_of(client, structured_outputs={"grammar": 'start: "ab" | "ac"'}, **THINKING[1])
    assert written["message"]["content"] in ("ab", "ac")


def test_without_parallel_calls_the_first_ends_the_turn():
    call = "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    client = client_of(f"</think>{call}{call}")
    for parallel, calls in ((True, 2), (False, 1)):
        choice = ask(client, tools=[ADD], parallel_tool_calls=parallel).json()["choices"][0]
        assert len(choice["message"]["tool_calls"]) == calls and choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"anyOf": [{"properties": {}}]}, "must list their properties"),
        ({"properties": {"a<b": {}}, "required": ["a<b"]}, "'a<b'"),
        ({"properties": {"a": {"enum": ["</arg_value>"], "type": "string"}}, "required": ["a"]}, "no value fits"),
    ],
)
def test_what_cannot_be_forced_has_a_sentence(parameters, sentence):
    with pytest.raises(InputError, match=sentence):
        call_rules([{"name": "f", "parameters": parameters}])


def test_a_schema_that_cannot_be_compiled_is_the_clients_fault(client):
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}
    response = ask(client, **short(response_format=bad))
    assert response.status_code == 400 and "'#/nowhere' leads to no schema" in response.json()["error"]["message"]


def test_no_structure_is_no_grammar():
    assert Structure().outputs(thinking=True, reasoning_tokens=5) is None
    assert answer_schema(None) is None and answer_schema({"type": "text"}) is None


def test_thinking_before_a_structure_takes_half_of_the_tokens_at_most(client):
    assert USER
    usage = ask(client, **short(max_tokens=40, response_format={"type": "json_object"}, seed=1)).json()["usage"]
    assert 1 <= usage["completion_tokens_details"]["reasoning_tokens"] <= 21
