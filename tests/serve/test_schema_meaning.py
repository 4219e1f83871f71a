"""What a schema means is kept where it is rewritten, and what means nothing is no reason to refuse it."""

import pytest

from glm5.errors import InputError
from glm5.serve import exclusive
from glm5.serve.budgets import Budget
from glm5.serve.exclusive import Exclusive
from glm5.serve.json_schemas import json_terminal, standalone
from glm5.serve.tool_rules import call_rules


def tool(**parameters):
    return [{"name": "f", "parameters": {"type": "object", **parameters}}]


def test_an_argument_that_is_required_but_not_listed_is_any_text():
    rules = "\n".join(call_rules(tool(properties={"a": {"type": "integer"}}, required=["b"])))
    assert 'call_0_1: <arg_key> "b"' in rules
    with pytest.raises(InputError, match="no value fits the schema of its argument 'b'"):
        call_rules(tool(properties={}, required=["b"], additionalProperties=False))


def test_names_with_keywords_beside_their_reference_are_refused():
    names = {"$ref": "#/$defs/S", "pattern": "^x"}
    schema = {"type": "object", "propertyNames": names, "$defs": {"S": {"type": "string"}}}
    with pytest.raises(InputError, match="'propertyNames'"):
        json_terminal(schema, schema, "It")
    del names["pattern"]
    assert "propertyNames" not in json_terminal(schema, schema, "It")


A = {"$defs": {"A": {"type": "integer"}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/A", "$defs": {"A": {"$id": "A", "type": "integer"}}},
        {"$ref": "#/$defs/A", "$defs": {"A": {"$anchor": "A", "type": "integer"}}},
        {"$ref": "http://x/y#/$defs/A", "$id": "http://x/y", **A},
        {"$ref": "http://x/y#/$defs/A", "$id": "http://x/y#", **A},
    ],
)
def test_names_of_schemas_are_no_reason_to_refuse(schema):
    alone = standalone(schema, schema, "It", Budget("It"))
    assert alone == {"$ref": "#/$defs/0", "$defs": {"0": {"type": "integer"}}}
    root = {key: value for key, value in schema.items() if key != "$ref"}
    rules = "\n".join(call_rules(tool(**root, properties={"a": {"$ref": schema["$ref"]}})))
    assert "call_0_0" in rules


def test_what_a_reference_means_below_another_name_is_not_guessed():
    inner = {"$id": "http://x/z", "items": {"$ref": "#/$defs/A"}, "type": "array"}
    schema = {"properties": {"a": inner}, **A}
    with pytest.raises(InputError, match="'\\$id'"):
        standalone(schema, schema, "It", Budget("It"))
    named = {"$id": "http://x/y", "properties": {"a": {**inner, "items": {"$ref": "http://x/y#/$defs/A"}}}, **A}
    assert "$id" not in standalone(named, named, "It", Budget("It"))["properties"]["a"]


def tagged(value, key="k", **more):
    inner = {"enum": value} if isinstance(value, list) else {"const": value}
    return {"type": "object", "properties": {key: inner}, "required": [key], **more}


WAYS = [
    ([{"type": "string"}, {"type": "integer"}], True),
    ([{"type": "integer"}, {"type": "number"}], False),
    ([{"anyOf": [{"type": "object"}, {"minimum": 5}]}, {"type": "integer"}], False),
    ([{"$ref": "#/$defs/open"}, {"type": "integer"}], False),
    ([{"enum": ["a", None]}, {"type": "array"}, {"allOf": [{}, {"type": "object"}]}], True),
    ([tagged("a"), tagged("b"), {"type": "null"}], True),
    ([tagged("a"), tagged("b", required=[])], True),
    ([tagged("a", required=[]), tagged("b", required=[]), tagged("c")], False),
    ([tagged("a"), tagged("b"), tagged("c", key="m")], False),
    ([tagged(["a", "b"]), tagged(["c", "b"])], False),
    ([tagged(1), tagged(1.0)], False),
    ([tagged(1), tagged(True)], True),
    ([tagged([{"a": 1, "b": 2}]), tagged([{"b": 2, "a": 1}])], False),
    ([tagged("a"), {"type": ["object", "null"]}], False),
    ([{"$ref": "#/$defs/circle"}, {"type": "string"}], False),
]


@pytest.mark.parametrize(("branches", "expected"), WAYS)
def test_branches_exclude_each_other(branches, expected):
    circle = {"anyOf": [{"$ref": "#/$defs/circle"}, {"type": "null"}]}
    root = {"$defs": {"open": {"anyOf": [{"type": "array"}, {}]}, "circle": circle}}
    assert Exclusive(root, Budget("It"))(branches) is expected


def test_many_branches_of_many_tags_cost_no_more_than_they_are_long(monkeypatch):
    tags = {f"t{i}": {"const": i} for i in range(50)}
    members = {f"m{i}": {"type": "object", "properties": {**tags, "kind": {"const": f"k{i}"}}, "required": ["kind"]}
               for i in range(250)}  # fmt: skip
    one = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in members]}
    looked = []
    monkeypatch.setattr(exclusive, "_values", lambda schema, read=exclusive._values: looked.append(1) or read(schema))
    read = Exclusive({"$defs": members}, Budget("It"))
    assert all(read(one["oneOf"]) for _ in range(4))
    assert len(looked) <= 250 * (51 + 1 + 4)
