"""Rules of a Lark grammar for calls of given tools in GLM-5's format, from the JSON schemas of their parameters.

    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>

Arguments come in the order of the schema, the optional ones may be left out. A string argument is bare text: `enum`,
`const`, `minLength`, `maxLength` and `pattern` are kept; `format` is an annotation. Every other type is JSON by its
schema. An argument that may be a string or something else is either, and a text that would read as the other is no
string. A tool without declared properties takes any arguments, unless `properties` is there and empty, or
`additionalProperties` is false, which means none; others beside the declared ones come where it asks for them.

Refused with a sentence: names that the format cannot spell, and parameters whose top level is a combination (`anyOf`,
`$ref`) instead of a list of properties; of a `strict` tool also what these rules would not hold (`strict_tools`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark

from glm5.engine.grammar import JSON_SPACING
from glm5.errors import InputError
from glm5.serve.strict_tools import ANNOTATIONS, check_strict, is_strict, resolved
from glm5.text.values import argument_types, exact_json

_NUMBERS = {"integer": r"/-?(0|[1-9][0-9]{0,17})/", "number": r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/"}
"""Plain numbers, of a length that every JSON reader takes."""
_NO_TAGS = r"~/(?s:.*)(<\/arg_value>|<\/tool_call>)(?s:.*)/"
_TEXT = rf"/(?s:.*)/ & {_NO_TAGS}"
_KEY = r"/[^<\s\x1c-\x1f]([^<]*[^<\s\x1c-\x1f])?/"
"""What a reader strips stands at no end."""
_SPACE = r"[\s\x1c-\x1f]*"
_READ_AS = {
    "null": "null", "boolean": "(true|false)", "number": r"-?[0-9][0-9.eE+\-]*", "integer": r"-?[0-9][0-9.eE+\-]*",
    "object": r"\{(?s:.*)", "array": r"\[(?s:.*)",
}  # fmt: skip
"""What the reader of an argument takes for a value that is no string, and a little more."""


def call_rules(tools: Sequence[Mapping[str, Any]], *, strict_only: bool = False) -> list[str]:
    """The rule `call` for any one of the tools (OpenAI's envelope or the bare function), and all that it needs.

    strict_only: a tool that is not strict takes any arguments, and one whose name cannot be spelled is left out.
    Raises `InputError`.
    """
    rules, calls = [], []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        parameters = function.get("parameters") or {}
        if is_strict(tool):
            check_strict(function["name"], parameters)
        elif strict_only:
            if not _spellable(function["name"]):
                continue
            parameters = {}
        calls.append(f"call_{number}")
        rules += _tool(f"call_{number}", function["name"], parameters)
    return ["call: " + " | ".join(calls), *rules]


def json_terminal(schema: Any, root: Mapping[str, Any]) -> str:
    """`%json` of a schema, with the definitions of the schema that it is part of."""
    if not isinstance(schema, Mapping):
        schema = {} if schema is not False else {"not": {}}
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root and name not in schema}
    return "%json " + json.dumps({**shared, **schema, "x-guidance": JSON_SPACING}, ensure_ascii=False)


def _tool(rule: str, name: str, parameters: Any) -> list[str]:
    where = f"The tool {name!r}"
    if not _spellable(name):
        raise InputError(
            f"{where} cannot be held to its schema: its name holds '<' or begins or ends with a space; rename it."
        )
    if not isinstance(parameters, Mapping):
        raise InputError(f"{where} has parameters that are no JSON schema; give an object.")
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping) or (
        "properties" not in parameters and any(key in parameters for key in ("anyOf", "oneOf", "allOf", "$ref"))
    ):
        raise InputError(
            f"{where} cannot be held to its schema: its parameters must list their properties at the top level."
        )
    wanted = parameters.get("required")
    required = [key for key in wanted if isinstance(key, str)] if isinstance(wanted, list) else []
    more = parameters.get("additionalProperties", "properties" not in parameters)
    rules, arguments = [], []
    for number, key in enumerate(dict.fromkeys([*properties, *required])):
        if not _spellable(key):
            if key in required:
                raise InputError(
                    f"{where} cannot be held to its schema: the argument {key!r} holds '<' or a space at an end."
                )
            continue
        argument = f"{rule}_{number}"
        value = _value(properties.get(key, more), key, parameters)
        if value is None:
            if key in required:
                raise InputError(
                    f"{where} cannot be held to its schema: no value fits the schema of its argument {key!r}."
                )
            continue
        spelled, choices = _choices(argument.upper(), value)
        rules += spelled
        rules.append(f"{argument}: <arg_key> {json.dumps(key)} </arg_key> <arg_value> {choices} </arg_value>")
        arguments.append(argument if key in required else f"{argument}?")
    if more is not False and (value := _value(more, "", {**parameters, "properties": {}})):
        spelled, choices = _choices(f"{rule.upper()}_MORE", value)
        taken = "".join(f" & ~/{regex_to_lark(re.escape(key), '')}/" for key in properties)
        rules += [*spelled, f"{rule.upper()}_KEY: {_KEY}{taken}"]
        arguments.append(f"(<arg_key> {rule.upper()}_KEY </arg_key> <arg_value> {choices} </arg_value>)*")
    return [f"{rule}: <tool_call> {json.dumps(name)} {' '.join(arguments)} </tool_call>", *rules]


def _choices(name: str, alternatives: Sequence[str]) -> tuple[list[str], str]:
    """Rules for the alternatives of one value that are terminals, and the choice between all."""
    names = [text if text.startswith("%") else f"{name}_{i}" for i, text in enumerate(alternatives)]
    rules = [f"{n}: {text}" for n, text in zip(names, alternatives, strict=True) if n != text]
    return rules, f"({' | '.join(names)})"


def _spellable(name: str) -> bool:
    return bool(name) and name == name.strip() and "<" not in name


def _value(
    schema: Any, key: str, parameters: Mapping[str, Any], depth: int = 0, beside: frozenset[str] = frozenset()
) -> list[str] | None:
    """Alternatives for an argument's text: terminals, or `%json`; None when nothing fits. beside: types of others."""
    types = argument_types({**parameters, "properties": {key: schema}}, key)
    plain, beside = resolved(schema, parameters), beside | types
    if not types:
        return [_TEXT]
    if "string" not in types:
        kind = plain.get("type")
        if isinstance(kind, str) and kind in _NUMBERS and plain.keys() <= ANNOTATIONS:
            return [_NUMBERS[kind]]
        return [json_terminal(plain, parameters)]
    if values := _listed(plain):
        return [text for value in values if (text := _literal(value, beside))] or None
    if isinstance(plain.get("type"), list) and (kinds := [kind for kind in plain["type"] if kind != "string"]):
        return [_string(plain, beside), json_terminal({**plain, "type": kinds}, parameters)]
    alternatives: list[str] = []
    for branch in _branches(plain) if depth < 4 and "type" not in plain else ():
        alternatives += _value(branch, key, parameters, depth + 1, beside) or []
    return alternatives or [_string(plain, beside)]


def _listed(schema: Mapping[str, Any]) -> list[Any]:
    """The values of `enum` or `const`."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return list(values) if isinstance(values, list) else []


def _literal(value: Any, types: frozenset[str]) -> str | None:
    """One given value as the model writes it; None where it would read as a tag, or as another value."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and types != {"string"} and exact_json(text, types) is not None:
        return None
    return None if "</arg_value>" in text or "</tool_call>" in text else json.dumps(text, ensure_ascii=False)


def _branches(schema: Mapping[str, Any]) -> Iterator[Any]:
    for name in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(name)
        yield from branches if isinstance(branches, list) else ()


def _string(schema: Mapping[str, Any], types: frozenset[str]) -> str:
    """A string's text: its length and pattern, no tag that ends it early, and nothing that reads as another type."""
    parts = []
    low, high = schema.get("minLength"), schema.get("maxLength")
    low = low if isinstance(low, int) and not isinstance(low, bool) and low > 0 else 0
    if isinstance(high, int) and not isinstance(high, bool):
        parts.append(f"/(?s:.{{{low},{max(low, high)}}})/")
    elif low:
        parts.append(f"/(?s:.{{{low},}})/")
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and pattern:
        begins = pattern.startswith("^")
        ends = pattern.endswith("$") and not pattern.endswith("\\$")
        body = pattern[begins : len(pattern) - ends]
        pattern = ("" if begins else "(?s:.*)") + f"({body})" + ("" if ends else "(?s:.*)")
        parts.append(f"/{regex_to_lark(pattern, 'dw')}/")
    for kind in sorted(types - {"string"}):
        parts.append(f"~/{_SPACE}{_READ_AS[kind]}{_SPACE}/")
    return " & ".join(["/(?s:.*)/", *parts, _NO_TAGS])
