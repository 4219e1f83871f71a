"""Rules of a Lark grammar for calls of given tools in GLM-5's format, from the JSON schemas of their parameters.

    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>

Arguments come in the order of the schema, the optional ones may be left out. A string argument is bare text: `enum`,
`const`, `minLength`, `maxLength` and `pattern` are kept; `format` is an annotation. Every other type is JSON by its
schema. An argument that may be a string or something else is either. A tool without declared properties takes any
arguments, unless `properties` is there and empty, which means none.

Refused with a sentence: names that the format cannot spell, and parameters whose top level is a combination (`anyOf`,
`$ref`) instead of a list of properties.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm5.errors import InputError
from glm5.text.values import argument_types

LONGEST_SPACE = 32
ANNOTATIONS = frozenset({"type", "title", "description", "default", "examples", "deprecated", "format", "$comment"})
_NUMBERS = {"integer": r"/-?(0|[1-9][0-9]{0,17})/", "number": r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/"}
"""Plain numbers, of a length that every JSON reader takes."""
_NO_TAGS = r"~/(?s:.*)(<\/arg_value>|<\/tool_call>)(?s:.*)/"
_TEXT = rf"/(?s:.*)/ & {_NO_TAGS}"
_FREE = r"(<arg_key> /[^<\s][^<\s]*/ </arg_key> <arg_value> FREE </arg_value>)*"


def call_rules(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rule `call` for any one of the tools (OpenAI's envelope or the bare function), and all that it needs."""
    rules, calls = [f"FREE: {_TEXT}"], []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        calls.append(f"call_{number}")
        rules += _tool(f"call_{number}", function["name"], function.get("parameters") or {})
    return ["call: " + " | ".join(calls), *rules]


def json_terminal(schema: Any, root: Mapping[str, Any]) -> str:
    """`%json` of a schema, with the definitions of the schema that it is part of."""
    if not isinstance(schema, Mapping):
        schema = {} if schema is not False else {"not": {}}
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root and name not in schema}
    space = {"x-guidance": {"whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{LONGEST_SPACE}}}"}}
    return "%json " + json.dumps({**shared, **schema, **space}, ensure_ascii=False)


def _tool(rule: str, name: str, parameters: Any) -> list[str]:
    where = f"The tool {name!r}"
    if not _spellable(name):
        raise InputError(f"{where} cannot be forced: its name holds '<' or begins or ends with a space; rename it.")
    if not isinstance(parameters, Mapping):
        raise InputError(f"{where} has parameters that are no JSON schema; give an object.")
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping) or (
        "properties" not in parameters and any(key in parameters for key in ("anyOf", "oneOf", "allOf", "$ref"))
    ):
        raise InputError(f"{where} cannot be forced: its parameters must list their properties at the top level.")
    wanted = parameters.get("required")
    required = [key for key in wanted if isinstance(key, str)] if isinstance(wanted, list) else []
    rules, arguments = [], []
    for number, key in enumerate(dict.fromkeys([*properties, *required])):
        if not _spellable(key):
            if key in required:
                raise InputError(f"{where} cannot be forced: the argument {key!r} holds '<' or a space at an end.")
            continue
        argument = f"{rule}_{number}"
        value = _value(properties.get(key, {}), key, parameters, depth=0)
        if value is None:
            if key in required:
                raise InputError(f"{where} cannot be forced: no value fits the schema of its argument {key!r}.")
            continue
        terminals = [f"{argument.upper()}_{i}: {text}" for i, text in enumerate(value) if not text.startswith("%")]
        rules += terminals
        choices = [text if text.startswith("%") else f"{argument.upper()}_{i}" for i, text in enumerate(value)]
        rules.append(
            f"{argument}: <arg_key> {json.dumps(key)} </arg_key> <arg_value> ({' | '.join(choices)}) </arg_value>"
        )
        arguments.append(argument if key in required else f"{argument}?")
    free = "properties" not in parameters or parameters.get("additionalProperties") not in (None, False)
    body = " ".join([*arguments, *([_FREE] if free else [])])
    return [f"{rule}: <tool_call> {json.dumps(name)} {body} </tool_call>", *rules]


def _spellable(name: str) -> bool:
    return bool(name) and name == name.strip() and "<" not in name


def _value(schema: Any, key: str, parameters: Mapping[str, Any], depth: int) -> list[str] | None:
    """Alternatives for an argument's text: terminals, or `%json`; None when nothing fits."""
    types = argument_types({**parameters, "properties": {key: schema}}, key)
    plain = _resolved(schema, parameters)
    if not types:
        return [_TEXT]
    if "string" not in types:
        kind = plain.get("type")
        if isinstance(kind, str) and kind in _NUMBERS and plain.keys() <= ANNOTATIONS:
            return [_NUMBERS[kind]]
        return [json_terminal(plain, parameters)]
    if values := _listed(plain):
        return list(values) if (values := [text for value in values if (text := _literal(value))]) else None
    if types == {"string"}:
        return [_string(plain)]
    if isinstance(plain.get("type"), list):
        others = [kind for kind in plain["type"] if kind != "string"]
        return [_string(plain), json_terminal({**plain, "type": others}, parameters)]
    alternatives: list[str] = []
    for branch in _branches(plain) if depth < 4 else ():
        alternatives += _value(branch, key, parameters, depth + 1) or []
    return alternatives or [_TEXT]


def _resolved(schema: Any, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema behind local references, a few of them in a row."""
    for _ in range(8):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        node: Any = parameters
        for part in reference[2:].split("/"):
            node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
        schema = node
    return schema if isinstance(schema, Mapping) else {}


def _listed(schema: Mapping[str, Any]) -> list[Any]:
    """The values of `enum` or `const`."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return list(values) if isinstance(values, list) else []


def _literal(value: Any) -> str | None:
    """One given value as the model writes it; None where it would read as a tag."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return None if "</arg_value>" in text or "</tool_call>" in text else json.dumps(text, ensure_ascii=False)


def _branches(schema: Mapping[str, Any]) -> Iterator[Any]:
    for name in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(name)
        yield from branches if isinstance(branches, list) else ()


def _string(schema: Mapping[str, Any]) -> str:
    """A string's text: its length and pattern, and no tag that would end it early."""
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
        parts.append("/" + slashes_escaped(pattern) + "/")
    return " & ".join([*(parts or ["/(?s:.*)/"]), _NO_TAGS])


def slashes_escaped(pattern: str) -> str:
    r"""A slash ends an expression in Lark: `/` becomes `\/`, unless it is escaped already."""
    escaped, backslash = [], False
    for character in pattern.replace("\n", "\\n"):
        escaped.append("\\/" if character == "/" and not backslash else character)
        backslash = character == "\\" and not backslash
    return "".join(escaped)
