"""Typing a tool-call argument: the model writes text, the tool's JSON schema says what it means.

A string argument is raw text, so that code needs no escaping. Any other type is read as JSON, then as JSON that was
escaped once too often, then as a Python literal (models write `True` and `None`), and the first reading that the schema
allows wins. A value that fits no reading stays a string: a tool's own complaint teaches a model more than a lost call.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

JSON_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_LONGEST_LITERAL = 100_000  # characters; Python's parser is slow and fragile beyond
_MODELS_TEXT = "<argument of a tool>"
# What Python thinks of a model's spelling ("1or 2") is nobody's to read. A filter for all times, since one that is set
# for a moment is set for the other threads too, and may be left behind.
warnings.filterwarnings("ignore", module=re.escape(_MODELS_TEXT))

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
"""Of a list, in a JSON pointer (RFC 6901: no leading zeros)."""

STRING = frozenset({"string"})


def argument_types(parameters: Mapping[str, Any], name: str) -> frozenset[str]:
    """The JSON types that a tool's schema allows for the argument; empty when it says nothing."""
    listed = at_top(parameters)
    properties = listed.get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    return schema_types(listed.get("additionalProperties") if schema is None else schema, parameters)


def schema_types(schema: Any, root: Any, spend: Callable[[int], None] | None = None) -> frozenset[str]:
    """The JSON types that a schema inside the root allows; empty when it says nothing.

    Follows `type` (also a list), `enum`, `const`, `anyOf`, `oneOf`, `allOf`, and `$ref` inside the root, each reference
    once. Parts that are no schema say nothing. spend: told of what is read, in characters of references and listed
    values and 1 for each schema; what it raises ends the reading.
    """
    found: set[str] = set()
    followed: set[str] = set()
    waiting = [schema]
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, Mapping):
            continue
        if spend is not None:
            spend(1 + len(str(schema.get("$ref", ""))) + len(_list(schema.get("enum"))))
        declared = schema.get("type")
        if declared:
            found.update(each for each in [declared, *_list(declared)] if isinstance(each, str))
            continue
        values = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
        found.update(*map(json_types, values))
        for branch in ("anyOf", "oneOf", "allOf"):
            waiting.extend(_list(schema.get(branch)))
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in followed:
            followed.add(reference)
            waiting.append(referred(reference, root))
    return frozenset(found & JSON_TYPES)


def at_top(parameters: Any) -> Mapping[str, Any]:
    """The keywords at the top of a tool's schema, those behind a `$ref` with them: pydantic writes a model that holds
    itself as `{"$ref": "#/$defs/Node", "$defs": ...}`. Empty for what is no schema."""
    top = dict(parameters) if isinstance(parameters, Mapping) else {}
    followed: set[Any] = set()
    while isinstance(reference := top.get("$ref"), str) and reference not in followed and "properties" not in top:
        followed.add(reference)
        target = referred(reference, parameters)
        if not isinstance(target, Mapping):
            break
        del top["$ref"]
        top = {**target, **top}
    return top


def referred(reference: Any, root: Any) -> Any:
    """The schema (a mapping or a bool) to which a JSON pointer leads inside the root: `#`, `#/$defs/Node`,
    `#/properties/a/anyOf/0`, each also behind the root's own `$id`. None if there is none."""
    if not isinstance(reference, str):
        return None
    name = root.get("$id") if isinstance(root, Mapping) else None
    if isinstance(name, str) and (name := name.removesuffix("#")) and reference.partition("#")[0] == name:
        reference = "#" + reference.partition("#")[2]
    if not (reference == "#" or reference.startswith("#/")):
        return None
    node: Any = root
    for part in unquote(reference).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list):
            node = node[int(part)] if _INDEX.fullmatch(part) and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping | bool) else None


def typed(text: str, types: frozenset[str]) -> Any:
    """The value of an argument's text. With no known type: JSON if it is that, else the text."""
    if types == STRING:
        return text
    for value in _readings(text):
        if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
            value = int(value)
        if not types and not isinstance(value, str):
            return value
        if not types.isdisjoint(json_types(value)) and (not isinstance(value, str) or types == STRING):
            return value
    return text


def value_json(text: str, types: frozenset[str], *, exact: bool) -> str:
    """The JSON of an argument's text. exact: as a grammar held it (`exact_json`)."""
    found = exact_json(text, types) if exact else None
    if found is None:
        found = to_json(text if exact and types else typed(text, types))
    return found


def exact_json(text: str, types: frozenset[str]) -> str | None:
    """The text itself, where it is the JSON of one of these types (any if empty) and no string; else None.

    How an argument is read that a grammar has held: any other reading could be one that its schema forbids.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_int=_whole)
    except (ValueError, RecursionError):
        return None
    fits = not isinstance(value, str) and (not types or not types.isdisjoint(json_types(value)))
    return text.strip() if fits else None


def to_json(value: Any) -> str:
    """JSON on one line with Unicode kept, as the chat template writes it."""
    return json.dumps(value, ensure_ascii=False)


def _list(value: Any) -> list[Any]:
    """The value if it is a list, else nothing: a schema comes from a client and may hold anything anywhere."""
    return list(value) if isinstance(value, list | tuple) else []


def json_types(value: Any) -> frozenset[str]:
    """The JSON types of a Python value."""
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"number"})
        case str():
            return STRING
        case list() | tuple():
            return frozenset({"array"})
        case dict():
            return frozenset({"object"})
    return frozenset()


def _readings(text: str) -> Iterator[Any]:
    """Values that the text may mean, the likeliest first, each one expressible in JSON."""
    for read in (_strict_json, _escaped_json, _literal):
        try:
            value = read(text.strip())
            yield json.loads(json.dumps(value, allow_nan=False))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _whole(digits: str) -> int:
    """Stands for any whole number: Python reads none of more than some thousand digits, and only the type counts."""
    return 0


def _strict_json(text: str) -> Any:
    return json.loads(text)


def _escaped_json(text: str) -> Any:
    inner = json.loads(text if text.startswith('"') else f'"{text}"')
    return json.loads(inner)


def _literal(text: str) -> Any:
    if len(text) > _LONGEST_LITERAL:
        raise ValueError("too long to read as a Python literal")
    return ast.literal_eval(compile(text, _MODELS_TEXT, "eval", ast.PyCF_ONLY_AST))
