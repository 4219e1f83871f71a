"""Rules of a Lark grammar for calls of given tools in GLM-5's format, from the JSON schemas of their parameters.

    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>

Arguments come in the order of the schema, the optional ones may be left out. A string argument is bare text: `enum`,
`const`, `minLength`, `maxLength` and `pattern` are kept; `format` is an annotation. Every other type is JSON by its
schema. An argument that may be a string or something else is either, and a text that would read as the other is no
string. A tool without declared properties takes any arguments, unless `properties` is there and empty, or
`additionalProperties` is false, which means none; others beside the declared ones come where it asks for them.

Refused with a sentence: names that the format cannot spell, parameters whose top level is a combination (`anyOf`) and
no list of properties, and JSON that cannot be held (`json_schemas`); of a `strict` tool also what these rules would not
hold (`strict_tools`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark

from glm5.errors import InputError
from glm5.serve.budgets import Budget
from glm5.serve.json_schemas import spelled, standalone
from glm5.serve.strict_tools import check_strict, is_strict
from glm5.serve.string_schemas import Alternative, StringSchema
from glm5.text.values import at_top, exact_json, schema_types

_NUMBERS = {"integer": r"/-?(0|[1-9][0-9]{0,17})/", "number": r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/"}
"""Plain numbers, of a length that every JSON reader takes."""
CLOSING = ("</arg_value>", "</tool_call>")
"""What ends a value for a reader of the text."""
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
    rules, calls, budget = [], [], Budget("A tool")
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        name, parameters = function["name"], function.get("parameters") or {}
        if strict_only and not is_strict(tool):
            if not _spellable(name):
                continue
            parameters = {}
        calls.append(f"call_{number}")
        budget.where = f"The tool {name!r}"
        try:
            if is_strict(tool):
                check_strict(name, parameters, budget)
            rules += _tool(f"call_{number}", name, parameters, budget)
        except RecursionError:
            raise InputError(f"The tool {name!r} has a schema that is nested too deeply; send a flatter one.") from None
    return ["call: " + " | ".join(calls), *rules]


def _tool(rule: str, name: str, parameters: Any, budget: Budget) -> list[str]:
    where = f"The tool {name!r}"
    if not _spellable(name):
        raise InputError(
            f"{where} cannot be held to its schema: its name holds '<' or begins or ends with a space; rename it."
        )
    if not isinstance(parameters, Mapping):
        raise InputError(f"{where} has parameters that are no JSON schema; give an object.")
    root, parameters = parameters, at_top(parameters)
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
    unlisted = parameters.get("additionalProperties", True)
    rules, arguments = [], []
    for number, key in enumerate(dict.fromkeys([*properties, *required])):
        if not _spellable(key):
            if key in required:
                raise InputError(
                    f"{where} cannot be held to its schema: the argument {key!r} holds '<' or a space at an end."
                )
            continue
        argument = f"{rule}_{number}"
        value = _value(properties.get(key, unlisted), root, budget, f"The argument {key!r} of the tool {name!r}")
        if value is None:
            if key in required:
                raise InputError(
                    f"{where} cannot be held to its schema: no value fits the schema of its argument {key!r}."
                )
            continue
        made, choices = _choices(argument.upper(), value)
        rules += made
        rules.append(f"{argument}: <arg_key> {json.dumps(key)} </arg_key> <arg_value> {choices} </arg_value>")
        arguments.append(argument if key in required else f"{argument}?")
    if more is not False and (
        value := _value(more, root, budget, f"An argument beside those listed of the tool {name!r}")
    ):
        made, choices = _choices(f"{rule.upper()}_MORE", value)
        taken = "".join(f" & ~/{regex_to_lark(re.escape(key), '')}/" for key in properties)
        rules += [*made, f"{rule.upper()}_KEY: {_KEY}{taken}"]
        arguments.append(f"(<arg_key> {rule.upper()}_KEY </arg_key> <arg_value> {choices} </arg_value>)*")
    return [f"{rule}: <tool_call> {json.dumps(name)} {' '.join(arguments)} </tool_call>", *rules]


def _choices(name: str, alternatives: Sequence[str]) -> tuple[list[str], str]:
    """Rules for the alternatives of one value that are terminals, and the choice between all."""
    names = [text if text.startswith("%") else f"{name}_{i}" for i, text in enumerate(alternatives)]
    rules = [f"{n}: {text}" for n, text in zip(names, alternatives, strict=True) if n != text]
    return rules, f"({' | '.join(names)})"


def _spellable(name: str) -> bool:
    return bool(name) and name == name.strip() and "<" not in name


def _value(schema: Any, root: Mapping[str, Any], budget: Budget, where: str) -> list[str] | None:
    """Alternatives for an argument's text: terminals, or `%json`; None when nothing fits. Raises `InputError`."""
    types = schema_types(schema, root, budget.spend)
    if not types:
        return None if schema is False else [_TEXT]
    strings = StringSchema(schema, root, budget)
    if "string" not in types and not strings.possible:
        return [_json(schema, root, budget, where)]
    found: list[str] = []
    for one in strings.alternatives:
        if one.texts is None:
            found.append(_string(one, types))
        else:
            found += [written for text in one.texts if (written := _literal(text, types))]
    if others := types & frozenset().union(*(one.others for one in strings.alternatives)):
        found.append(_json({"allOf": [schema, {"type": sorted(others)}]}, root, budget, where))
    return list(dict.fromkeys(found)) or None


def _json(schema: Any, root: Mapping[str, Any], budget: Budget, where: str) -> str:
    alone = standalone(schema, root, where, budget)
    if alone.keys() == {"type"} and isinstance(kind := alone["type"], str) and kind in _NUMBERS:
        return _NUMBERS[kind]
    text = spelled(alone)
    if any(tag in text for tag in CLOSING):
        raise InputError(f"{where} cannot be held to its schema, which spells a tag that ends an argument; change it.")
    return text


def _literal(text: str, types: frozenset[str]) -> str | None:
    """A given string as the model writes it; None where it would read as a tag, or as another value."""
    if types != {"string"} and exact_json(text, types) is not None:
        return None
    return None if any(tag in text for tag in CLOSING) else json.dumps(text, ensure_ascii=False)


def _string(one: Alternative, types: frozenset[str]) -> str:
    """A string's text: its length and patterns, no tag that ends it early, and nothing that reads as another type."""
    parts = []
    if one.high < math.inf or one.low:
        parts.append(f"/(?s:.{{{one.low},{'' if one.high == math.inf else one.high}}})/")
    for pattern in one.patterns:
        begins = pattern.startswith("^")
        ends = pattern.endswith("$") and not pattern.endswith("\\$")
        body = pattern[begins : len(pattern) - ends]
        whole = ("" if begins else "(?s:.*)") + f"({body})" + ("" if ends else "(?s:.*)")
        parts.append(f"/{regex_to_lark(whole, 'dw')}/")
    for kind in sorted(types - {"string"}):
        parts.append(f"~/{_SPACE}{_READ_AS[kind]}{_SPACE}/")
    return " & ".join(["/(?s:.*)/", *parts, _NO_TAGS])
