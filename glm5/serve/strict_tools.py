"""`strict: true` on a tool: its calls have arguments of its schema, whatever the model would like.

The rules of `tool_rules` hold a part of JSON Schema to the letter; llguidance holds, or refuses, what stands inside an
argument that is JSON. What neither would hold is refused here, with a sentence, before anything is sampled. One thing
is held by nobody: inside JSON, an object that declares a key and takes others too may get that key a second time,
spelled by an escape (`"\\u006b"` for `"k"`); `additionalProperties: false` closes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm5.errors import InputError
from glm5.text.values import argument_types, json_types

ANNOTATIONS = frozenset(
    {"type", "title", "description", "default", "examples", "deprecated", "format", "readOnly", "writeOnly", "$comment"}
)
_TOP = ANNOTATIONS | {"properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
_SHARED = ("#/$defs/", "#/definitions/")
"""Where a reference may lead: an argument is a schema of its own, with these and nothing else of its surroundings."""
_MOVED = frozenset({"$defs", "definitions", "$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef"})
"""What would mean something else below the top."""
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})
_VALUES = frozenset({"enum", "const", "default", "examples"})
_OF_STRINGS = frozenset({"minLength", "maxLength", "pattern"})
_REFERRED = 8
"""References that are followed in a row."""


def is_strict(tool: Mapping[str, Any]) -> bool:
    """Whether a tool (OpenAI's envelope or the bare function) is."""
    return tool.get("function", tool).get("strict") is True


def as_held(tools: Sequence[Mapping[str, Any]], *, held: bool) -> list[Mapping[str, Any]]:
    """The tools for the reader of their calls, for whom none is strict where no grammar holds them."""
    if held:
        return list(tools)
    loose = lambda function: {key: value for key, value in function.items() if key != "strict"}
    return [{**tool, "function": loose(tool["function"])} if "function" in tool else loose(tool) for tool in tools]


def check_strict(name: str, parameters: Any) -> None:
    """Raises `InputError` for parameters whose calls could be wrong."""
    if not isinstance(parameters, Mapping):
        raise InputError(f"The tool {name!r} has parameters that are no JSON schema; give an object.")
    if parameters.get("type", "object") != "object":
        raise InputError(f"The parameters of the strict tool {name!r} must be of the type object.")
    _refuse(parameters.keys() - _TOP, f"The strict tool {name!r}")
    _check_references(name, parameters)
    properties = parameters.get("properties", {})
    for key, schema in properties.items() if isinstance(properties, Mapping) else ():
        _check_argument(schema, key, parameters, f"The argument {key!r} of the strict tool {name!r}", depth=0)
    more = parameters.get("additionalProperties")
    if isinstance(more, Mapping):
        where = f"additionalProperties of the strict tool {name!r}"
        _check_argument(more, "", {**parameters, "properties": {"": more}}, where, depth=0)


def _check_references(name: str, parameters: Mapping[str, Any]) -> None:
    """Raises `InputError` for a schema, however deep, that leads elsewhere than to the shared ones."""
    where = f"A schema of the strict tool {name!r}"
    waiting = [*_inner(parameters)]
    while waiting:
        schema = waiting.pop()
        _refuse(schema.keys() & _MOVED, where)
        if "$ref" in schema:
            reference = schema["$ref"]
            if not isinstance(reference, str) or not reference.startswith(_SHARED):
                _refuse({"$ref"}, where)
            if _target(reference, parameters) is None:
                _refuse({"$ref"}, f"{where}, which refers to nothing,")
            _refuse(schema.keys() - (ANNOTATIONS - {"type"}) - {"$ref"}, f"{where}, which is a reference,")
        waiting.extend(_inner(schema))


def _inner(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemas that stand directly in one."""
    for keyword, value in schema.items():
        if keyword in _VALUES:
            continue
        if keyword in _NAMED and isinstance(value, Mapping):
            value = list(value.values())
        yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, Mapping))


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
        _check_listed(plain, types, where)
    elif "anyOf" in asked:
        _refuse(asked - {"anyOf"} | plain.keys() & {"type"}, f"{where}, which is one of several,")
        branches = plain["anyOf"]
        if not isinstance(branches, list) or depth > 3:
            raise InputError(f"{where} has an anyOf that is no list, or is nested too deeply; write it flatter.")
        for branch in branches:
            _check_argument(branch, key, parameters, where, depth + 1)
    elif isinstance(plain.get("type"), list):
        _refuse(asked & {"allOf", "oneOf", "not", "if", "then", "else", "$ref"}, where)
        _check_string(plain, where)
    else:
        _refuse(asked - _OF_STRINGS, where)
        _check_string(plain, where)


def _check_listed(schema: Mapping[str, Any], types: frozenset[str], where: str) -> None:
    """Values are one list, of the types that are asked for."""
    (keyword, *others) = sorted(schema.keys() & {"enum", "const"})
    values = schema[keyword] if keyword == "enum" else [schema[keyword]]
    if others or not isinstance(values, list) or any(types.isdisjoint(json_types(value)) for value in values):
        _refuse({"enum", "const"} & schema.keys(), where)


def _check_string(schema: Mapping[str, Any], where: str) -> None:
    """Lengths are whole numbers in order, a pattern is a text."""
    low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
    for keyword, length in (("minLength", low), ("maxLength", high)):
        if keyword in schema and (type(length) is not int or length < 0):
            _refuse({keyword}, where)
    if low > high:
        _refuse({"minLength"}, f"{where}, where maxLength is less,")
    if not isinstance(schema.get("pattern", ""), str):
        _refuse({"pattern"}, where)


def _refuse(keywords: Any, where: str) -> None:
    if keywords:
        raise InputError(f"{where} uses {min(keywords)!r}, which is not held to the letter; leave it out, or strict.")


def resolved(schema: Any, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema behind local references, a few of them in a row."""
    for _ in range(_REFERRED):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        schema = _target(reference, parameters)
    return schema if isinstance(schema, Mapping) else {}


def _target(reference: str, parameters: Mapping[str, Any]) -> Any:
    """What a local reference leads to; None if nothing, or no schema of keywords."""
    node: Any = parameters
    for part in reference[2:].split("/"):
        node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else None
