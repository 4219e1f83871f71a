"""A JSON schema inside a larger one, written so that it stands alone: the `%json` of one argument in a grammar.

References may lead anywhere in the larger schema (`#`, `#/$defs/Node`, `#/properties/a/items`), in circles too: what
they lead to comes along under `$defs`, each once. What says nothing about a value is left out, `format`s that
llguidance does not know among it (JSON Schema takes every format for an annotation), and so is what asks for nothing
(`uniqueItems: false`, `propertyNames: {"type": "string"}`, which Zod writes for every record). Keywords that no grammar
here can hold are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from glm5.engine.grammar import JSON_SPACING
from glm5.errors import InputError
from glm5.serve.budgets import EACH, Budget
from glm5.serve.exclusive import Exclusive
from glm5.text.values import referred

ANNOTATIONS = frozenset(
    {"title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
     "$schema", "discriminator", "nullable", "contentEncoding", "contentMediaType", "contentSchema"}
)  # fmt: skip
DEFINITIONS = frozenset({"$defs", "definitions"})
_FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
)  # fmt: skip
_UNHELD = frozenset(
    {"uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties", "not", "if",
     "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames", "$dynamicRef",
     "$recursiveRef"}
)  # fmt: skip
_ANCHORS = frozenset({"$anchor", "$dynamicAnchor", "$recursiveAnchor"})
"""Names for references, none of which is followed."""
_SILENT = ANNOTATIONS | DEFINITIONS | _ANCHORS | {"$id"}
_NAMED = frozenset({"properties", "patternProperties"})
_VALUES = frozenset({"enum", "const", "required", "type", "x-guidance"})


def json_terminal(schema: Any, root: Any, where: str) -> str:
    """`%json` of a schema that is part of the root (or is it). Raises `InputError`, which says where."""
    try:
        return spelled(standalone(schema, root, where, Budget(where)))
    except RecursionError:
        raise InputError(f"{where} is nested too deeply; send a flatter schema.") from None


def spelled(alone: Mapping[str, Any]) -> str:
    """`%json` of a schema that stands alone."""
    return "%json " + json.dumps({**alone, "x-guidance": JSON_SPACING}, ensure_ascii=False)


def standalone(schema: Any, root: Any, where: str, budget: Budget) -> dict[str, Any]:
    """The schema with all that it refers to in the root. Raises `InputError` for what cannot be followed or held, and
    for copies that cost more than is left of the budget."""
    if schema is False:
        return {"enum": []}
    copy = _Copy(root, where, budget)
    alone = copy.schema(schema if isinstance(schema, Mapping) else {}, top=schema is root)
    shared = copy.shared()
    return {**alone, "$defs": shared} if shared else alone


class _Copy:
    """Schemas rewritten one after the other; what they refer to gets numbers."""

    def __init__(self, root: Any, where: str, budget: Budget) -> None:
        self._root, self._where, self._budget = root, where, budget
        self._numbers: dict[int, str] = {}
        """By the identity of the schema, which pointers spell in many ways."""
        self._waiting: list[Any] = []
        self._exclusive = Exclusive(root, budget)
        self._moved = False
        """Whether a schema around has an `$id`: what `#` means below it is not followed."""

    def shared(self) -> dict[str, Any]:
        """All that was referred to, by number."""
        found: dict[str, Any] = {}
        for target in self._waiting:  # which grows, for each may refer to more
            found[self._numbers[id(target)]] = self._inner(target, top=target is self._root)
        return found

    def schema(self, schema: Mapping[str, Any], *, top: bool = False) -> dict[str, Any]:
        """One, with those in it. top: the root itself, whose `$id` changes nothing."""
        self._budget.spend(EACH)
        kept: dict[str, Any] = {}
        around, self._moved = self._moved, not top and (self._moved or "$id" in schema)
        for keyword, value in _as_held(schema, self._root).items():
            if keyword in _SILENT or (keyword == "format" and str(value) not in _FORMATS):
                continue
            if keyword in _UNHELD or (keyword == "$ref" and self._moved and str(value).startswith("#")):
                keyword = "$id" if keyword == "$ref" else keyword
                raise InputError(f"{self._where} uses {keyword!r}, which cannot be held; leave it out.")
            if keyword == "oneOf" and "anyOf" not in schema and self._exclusive(value):
                keyword = "anyOf"
            self._budget.spend(len(keyword))
            kept[keyword] = self._value(keyword, value)
        self._moved = around
        return kept

    def _value(self, keyword: str, value: Any) -> Any:
        if keyword == "$ref":
            return f"#/$defs/{self._number(value)}"
        if keyword in _VALUES:
            self._budget.spend(len(json.dumps(value)))
            return value
        if keyword in _NAMED and isinstance(value, Mapping):
            self._budget.spend(sum(map(len, value)))
            return {name: self._inner(each) for name, each in value.items()}
        return [self._inner(each) for each in value] if isinstance(value, list) else self._inner(value)

    def _inner(self, value: Any, *, top: bool = False) -> Any:
        if isinstance(value, Mapping):
            return self.schema(value, top=top)
        self._budget.spend(len(json.dumps(value)))
        return value

    def _number(self, reference: Any) -> str:
        self._budget.spend(len(str(reference)))
        target = referred(reference, self._root)
        if target is None:
            raise InputError(f"{self._where} uses '$ref': {reference!r} leads to no schema in it; mend it.")
        if id(target) not in self._numbers:
            self._numbers[id(target)] = str(len(self._numbers))
            self._waiting.append(target)
        return self._numbers[id(target)]


def _as_held(schema: Mapping[str, Any], root: Any) -> Mapping[str, Any]:
    """The same schema without what asks for nothing, and with names of properties in words that are held."""
    held = dict(schema)
    if held.get("uniqueItems") is False or held.get("maxItems") in (0, 1):
        held.pop("uniqueItems", None)
    names = held.get("propertyNames")
    if isinstance(names, Mapping) and names.keys() - ANNOTATIONS == {"$ref"}:
        names = _behind(names, root)
    if names is True or (isinstance(names, Mapping) and names.get("type", "string") == "string"):
        asked = {} if names is True else {k: v for k, v in names.items() if k not in ANNOTATIONS | {"type"}}
        open_ = _NAMED.isdisjoint(held)
        more = held.get("additionalProperties", True)
        if not asked:
            del held["propertyNames"]
        elif asked.keys() == {"enum"} and open_ and _texts(asked["enum"]):
            del held["propertyNames"]
            held |= {"properties": dict.fromkeys(asked["enum"], more), "additionalProperties": False}
        elif asked.keys() == {"pattern"} and open_ and isinstance(asked["pattern"], str):
            del held["propertyNames"]
            held |= {"patternProperties": {asked["pattern"]: more}, "additionalProperties": False}
    return held


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, str) for each in values)


def _behind(schema: Any, root: Any) -> Mapping[str, Any]:
    """What a schema that is a reference leads to, some of them in a row."""
    for _ in range(8):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            break
        schema = referred(schema["$ref"], root)
    return schema if isinstance(schema, Mapping) else {}
