"""What a schema means is kept where it is rewritten, and what means nothing is no reason to refuse it."""

import pytest

from glm5.errors import InputError
from glm5.serve.json_schemas import json_terminal
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
