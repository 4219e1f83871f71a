"""Typing of tool arguments by JSON schema, against a table, and JSON of the right type comes back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.text.values import argument_types, exact_json, referred, to_json, typed

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "either": {"type": ["integer", "null"]},
        "any": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
        "mode": {"enum": ["fast", "slow"]},
        "level": {"enum": [1, 2.5, None]},
        "fixed": {"const": True},
        "ref": {"$ref": "#/$defs/Mode"},
        "loop": {"$ref": "#/$defs/Loop"},
        "away": {"$ref": "https://example.org/x"},
        "all": {"allOf": [{"$ref": "#/$defs/Mode"}, {"description": "d"}]},
        "free": {"description": "no type"},
        "odd": {"type": "file"},
    },
    "$defs": {
        "Mode": {"type": "string", "enum": ["a"]},
        "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "null"}]},
    },
}


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("name", {"string"}), ("either", {"integer", "null"}), ("any", {"string", "array"}), ("mode", {"string"}),
        ("level", {"integer", "number", "null"}), ("fixed", {"boolean"}), ("ref", {"string"}), ("loop", {"null"}),
        ("away", set()), ("all", {"string"}), ("free", set()), ("odd", set()), ("missing", set()),
    ],
)  # fmt: skip
def test_types_of_a_schema(name: str, types: set[str]) -> None:
    assert argument_types(PARAMETERS, name) == types


def test_types_of_arguments_that_the_schema_does_not_name() -> None:
    assert argument_types({"additionalProperties": {"type": "string"}}, "x") == {"string"}
    assert argument_types({"additionalProperties": True, "properties": {"x": True}}, "x") == set()
    assert argument_types({}, "x") == set()


NODE = {"type": "object", "properties": {"value": {"type": "string"}, "next": {"$ref": "#/$defs/Node"}}}


def test_types_of_a_model_that_holds_itself() -> None:
    """As pydantic writes it: the top is a reference."""
    parameters = {"$ref": "#/$defs/Node", "$defs": {"Node": NODE}}
    assert argument_types(parameters, "value") == {"string"} and argument_types(parameters, "next") == {"object"}
    assert argument_types({"$ref": "#"}, "value") == argument_types({"$ref": "#/$defs/No"}, "value") == set()


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("#", "whole"), ("#/anyOf/1", {"type": "null"}), ("#/anyOf/2", None), ("#/anyOf/x", None),
        ("#/anyOf/" + "9" * 5000, None), ("#/anyOf/0000000001", None), ("#/anyOf/01", None), ("#/anyOf/²", None),
        ("#/anyOf/" + "0" * 5000, None), ("#/$defs/a%20b~1c", False), ("#/$defs", "definitions"), ("#/type", None),
        ("other.json", None), ("#anchor", None), (5, None),
    ],
)  # fmt: skip
def test_where_a_reference_leads(reference: Any, found: Any) -> None:
    root = {"type": "object", "anyOf": [{}, {"type": "null"}], "$defs": {"a b/c": False}}
    expected = {"whole": root, "definitions": root["$defs"]}.get(found, found) if isinstance(found, str) else found
    assert referred(reference, root) == expected


BROKEN = [
    {"anyOf": 5}, {"oneOf": {"a": 1}}, {"allOf": "string"}, {"anyOf": [5, None]}, {"enum": 5}, {"type": 5},
    {"type": {"a": 1}}, {"type": [[1], None]}, {"$ref": 5}, {"$ref": "#/nowhere/5"}, 5, [], "string",
]  # fmt: skip


@pytest.mark.parametrize("schema", BROKEN, ids=str)
def test_a_broken_schema_says_nothing(schema: Any) -> None:
    assert argument_types({"properties": {"x": schema}}, "x") == set()
    assert argument_types({"properties": schema, "additionalProperties": schema}, "x") == set()
    assert argument_types(schema, "x") == set()
    beside = {"anyOf": [schema, {"type": "integer"}]}
    assert argument_types({"properties": {"x": beside}}, "x") == {"integer"}


class Counted(dict):
    """A dict that counts how often it is looked at."""

    looks = 0

    def get(self, key: Any, default: Any = None) -> Any:
        self.looks += 1
        return super().get(key, default)


def test_a_reference_is_followed_once() -> None:
    loop = Counted(anyOf=[{"$ref": "#/$defs/Loop"}, {"$ref": "#/$defs/Loop"}, {"type": "null"}])
    assert argument_types({"properties": {"x": {"$ref": "#/$defs/Loop"}}, "$defs": {"Loop": loop}}, "x") == {"null"}
    assert loop.looks < 10


def test_a_deeply_nested_schema_is_read() -> None:
    schema: Any = {"type": "integer"}
    for _ in range(5_000):
        schema = {"anyOf": [schema]}
    assert argument_types({"properties": {"x": schema}}, "x") == {"integer"}


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("42", {"string"}, "42"),
        ("42", {"integer"}, 42),
        (" 42\n", {"integer"}, 42),
        ("42.0", {"integer"}, 42),
        ("42.5", {"integer"}, "42.5"),
        ("1e3", {"number"}, 1000.0),
        ("1,000", {"number"}, "1,000"),
        ("true", {"boolean"}, True),
        ("True", {"boolean"}, True),
        ("yes", {"boolean"}, "yes"),
        ("1", {"boolean"}, "1"),
        ("null", {"null", "string"}, None),
        ("None", {"null", "integer"}, None),
        ("5", {"null", "string"}, "5"),
        ("5", {"integer", "string"}, 5),
        ('"5"', {"integer"}, 5),
        ("[1, 2]", {"array", "string"}, [1, 2]),
        ("['a', \"b\"]", {"array"}, ["a", "b"]),
        ("(1, 2)", {"array"}, [1, 2]),
        ("{'a': True}", {"object"}, {"a": True}),
        ('{\\"a\\": 1}', {"object"}, {"a": 1}),
        ('"[1]"', {"array"}, [1]),
        ("{a: 1}", {"object"}, "{a: 1}"),
        ("a, b", {"array"}, "a, b"),
        ("", {"integer"}, ""),
        ("NaN", {"number"}, "NaN"),
        ("1e999", {"number"}, "1e999"),
        ("[" * 100_000, {"array"}, "[" * 100_000),
        ("9" * 5_000, {"integer"}, "9" * 5_000),
        ("42", set(), 42),
        ("[1]", set(), [1]),
        ("01234", set(), "01234"),
        ("hello", set(), "hello"),
        ('"quoted"', set(), '"quoted"'),
        ("<b>", set(), "<b>"),
    ],
)
def test_readings(text: str, types: set[str], value: Any) -> None:
    found = typed(text, frozenset(types))
    assert found == value and type(found) is type(value)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**9), 10**9)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_json_of_the_declared_type_comes_back(value: Any) -> None:
    names = {
        type(None): "null",
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
    }
    text = value if isinstance(value, str) else to_json(value)
    assert typed(text, frozenset({names[type(value)]})) == value
    if not isinstance(value, str):
        assert typed(text, frozenset()) == value


def test_a_number_of_any_length_is_read_exactly():
    digits = "1" * 5000  # more than Python's int takes
    assert exact_json(digits, frozenset({"integer"})) == digits
    assert exact_json(f"[{digits}]", frozenset({"array"})) == f"[{digits}]"
    assert exact_json(digits, frozenset({"boolean", "string"})) is None


def test_what_python_thinks_of_a_models_spelling_is_said_to_nobody():
    program = "import sys; from glm5.text.values import typed; print(typed(sys.stdin.read(), frozenset()))"
    text = "[1or 2, 0x1for x in y]"
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], input=text, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (text + "\n", "")
