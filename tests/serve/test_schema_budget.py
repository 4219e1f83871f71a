"""Schemas of a few kilobytes that multiply out are refused with a sentence, before what they ask for is made."""

import json

import pytest

from glm5.errors import InputError
from glm5.serve import budgets
from glm5.serve.json_schemas import standalone
from glm5.serve.string_schemas import Alternative, StringSchema
from glm5.serve.tool_rules import call_rules
from glm5.text.values import schema_types

TOO_MUCH = "multiplies out to too much"


def strict(schema, definitions):
    root = {"type": "object", "properties": {"a": schema}, "required": ["a"], "$defs": definitions}
    return [{"name": "f", "parameters": {**root, "additionalProperties": False}, "strict": True}]


def ref(name):
    return {"$ref": f"#/$defs/{name}"}


def counted(monkeypatch, name):
    """How often a function of a module is called from now on: a list that grows."""
    calls = []
    module, function = name
    original = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *given, **named: calls.append(1) or original(*given, **named))
    return calls


LENGTHS = {"anyOf": [{"type": "string", "maxLength": i} for i in range(1000)]}
WORDS = {"enum": [f"w{i}" for i in range(1000)]}
MULTIPLIED = {
    "alternatives times values": ({"allOf": [ref("m"), *[ref("n")] * 300]}, {"m": LENGTHS, "n": WORDS}),
    "a long list of lists": ({"anyOf": [ref("m")] * 10_000}, {"m": LENGTHS}),
    "one of many lists of values": ({"oneOf": [ref("n")] * 10_000}, {"n": WORDS}),
    "a long pattern in each": (
        {"allOf": [ref("m"), {"type": "string", "pattern": "a" * 100_000}]}, {"m": LENGTHS},
    ),
    "the same, spelled in many ways": (
        {"anyOf": [{"$ref": "#/$defs/" + "%6D" * i + "m" * (13 - i)} for i in range(14)] * 100}, {"m" * 13: LENGTHS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MULTIPLIED)
def test_a_string_that_multiplies_out_is_refused(monkeypatch, case):
    made = counted(monkeypatch, (Alternative, "__and__"))
    with pytest.raises(InputError, match=TOO_MUCH):
        call_rules(strict(*MULTIPLIED[case]))
    assert len(made) <= budgets.MOST / (2 * budgets.EACH)


def test_many_arguments_share_one_budget():
    names = {f"a{i}": ref("m") for i in range(2_000)}
    tool = {"name": "f", "parameters": {"properties": names, "$defs": {"m": LENGTHS}}}
    with pytest.raises(InputError, match=f"'f'.*{TOO_MUCH}"):
        call_rules([tool])


def test_values_are_written_once_for_each_schema_that_lists_them(monkeypatch):
    written = counted(monkeypatch, (json, "dumps"))
    schema = {"allOf": [{"anyOf": [{"type": "string", "maxLength": 9 + i} for i in range(50)]}, ref("n")]}
    StringSchema(schema, {"$defs": {"n": {"enum": ["a", "b"]}}}, budgets.Budget("It"))
    assert len(written) == 2


def test_large_lists_of_a_usual_tool_are_held():
    words = [f"word number {i}" for i in range(2_000)]
    maybe = {"anyOf": [{"type": "string", "enum": words}, {"type": "null"}]}
    rules = "\n".join(call_rules(strict(maybe, {})))
    assert all(json.dumps(word) in rules for word in words)


DEEP = 60
NESTED: dict = {"type": "integer"}
for _ in range(DEEP):
    NESTED = {"type": "array", "items": NESTED, "minItems": 1}


def test_one_schema_under_many_spellings_of_its_name_is_copied_once():
    spellings = ["#/$defs/" + "%6D" * i + "m" * (60 - i) for i in range(61)]
    items = [{"$ref": spelling} for spelling in spellings]
    target = {"type": "array", "prefixItems": items}
    alone = standalone(ref("m" * 60), {"$defs": {"m" * 60: target}}, "It", budgets.Budget("It"))
    assert len(alone["$defs"]) == 1


def test_pointers_into_nested_parts_copy_no_more_than_the_budget(monkeypatch):
    """Each of these is a schema of its own, and most of it stands in all others too."""
    pointers = ["#/$defs/m" + "/items" * i for i in range(DEEP)]
    schema = {"type": "array", "prefixItems": [{"$ref": pointer} for pointer in pointers]}
    root = {"$defs": {"m": NESTED}}
    assert len(standalone(schema, root, "It", budgets.Budget("It"))["$defs"]) == DEEP
    with pytest.raises(InputError, match=f"It .*{TOO_MUCH}"):
        standalone(schema, root, "It", budgets.Budget("It", most=DEEP * DEEP * budgets.EACH // 2))


def test_a_list_of_values_is_paid_for_in_each_copy():
    words = {"type": "array", "items": {"enum": ["x" * 10_000]}}
    tool = {"name": "f", "parameters": {"properties": {f"a{i}": ref("m") for i in range(200)}, "$defs": {"m": words}}}
    with pytest.raises(InputError, match=TOO_MUCH):
        call_rules([tool])


def test_types_that_many_arguments_ask_for_are_paid_for():
    """No string is among them, so nothing else is read of these schemas before their types are known."""
    many = {"anyOf": [{"type": "integer", "minimum": i} for i in range(1_000)]}
    read = []
    types = schema_types(ref("m"), {"$defs": {"m": many}}, read.append)
    assert types == {"integer"} and sum(read) >= 1_000
