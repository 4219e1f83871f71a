"""`strict: true` on a tool: its calls have arguments of its schema, whatever the model would like.

The rules of `tool_rules` hold a part of JSON Schema to the letter; llguidance holds, or refuses, what stands inside an
argument that is JSON. What neither would hold is refused here, with a sentence, before anything is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm5.errors import InputError
from glm5.text.values import argument_types

ANNOTATIONS = frozenset(
    {"type", "title", "description", "default", "examples", "deprecated", "format", "readOnly", "writeOnly", "$comment"}
)
_TOP = ANNOTATIONS | {"properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
_OF_STRINGS = frozenset({"minLength", "maxLength", "pattern"})
_REFERRED = 8
"""References that are followed in a row."""


def is_strict(tool: Mapping[str, Any]) -> bool:
    """Whether a tool (OpenAI's envelope or the bare function) is."""
    return tool.get("function", tool).get("strict") is True


def check_strict(name: str, parameters: Any) -> None:
    """Raises `InputError` for parameters whose calls could be wrong."""
    if not isinstance(parameters, Mapping):
        raise InputError(f"The tool {name!r} has parameters that are no JSON schema; give an object.")
    if parameters.get("type", "object") != "object":
        raise InputError(f"The parameters of the strict tool {name!r} must be of the type object.")
    _refuse(parameters.keys() - _TOP, f"The strict tool {name!r}")
    properties = parameters.get("properties", {})
    for key, schema in properties.items() if isinstance(properties, Mapping) else ():
        _check_argument(schema, key, parameters, f"The argument {key!r} of the strict tool {name!r}", depth=0)
    more = parameters.get("additionalProperties")
    if isinstance(more, Mapping):
        where = f"additionalProperties of the strict tool {name!r}"
        _check_argument(more, "", {**parameters, "properties": {"": more}}, where, depth=0)


def _check_argument(schema: Any, key: str, parameters: Mapping[str, Any], where: str, depth: int) -> None:
    """Only where an argument may be a string do our own rules write it."""
    types = argument_types({**parameters, "properties": {key: schema}}, key)
    plain = resolved(schema, parameters)
    asked = plain.keys() - ANNOTATIONS - {"$defs", "definitions"}
    if not types:
        if asked:
            raise InputError(f"{where} needs a type: its schema would not be held without one.")
    elif "string" not in types:
        return
    elif "enum" in asked or "const" in asked:
        _refuse(asked - {"enum", "const"}, f"{where}, which lists its values,")
    elif "anyOf" in asked:
        _refuse(asked - {"anyOf"}, f"{where}, which is one of several,")
        branches = plain["anyOf"]
        if not isinstance(branches, list) or depth > 3:
            raise InputError(f"{where} has an anyOf that is no list, or is nested too deeply; write it flatter.")
        for branch in branches:
            _check_argument(branch, key, parameters, where, depth + 1)
    elif isinstance(plain.get("type"), list):
        _refuse(asked & {"allOf", "oneOf", "not", "if", "then", "else", "$ref"}, where)
    else:
        _refuse(asked - _OF_STRINGS, where)


def _refuse(keywords: Any, where: str) -> None:
    if keywords:
        raise InputError(f"{where} uses {min(keywords)!r}, which is not held to the letter; leave it out, or strict.")


def resolved(schema: Any, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema behind local references, a few of them in a row."""
    for _ in range(_REFERRED):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        node: Any = parameters
        for part in reference[2:].split("/"):
            node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
        schema = node
    return schema if isinstance(schema, Mapping) else {}
