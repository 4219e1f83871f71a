"""Whether the branches of a `oneOf` exclude each other, so that `anyOf` says the same: they differ in type, or in a tag
that each lists, as in the tagged unions of pydantic and Zod. (llguidance sees that too, but not behind references.)

Every schema is read once, and a `oneOf` takes time in proportion to its branches and their tags. What is not seen here
counts as an overlap: other pairs of branches that differ by other tags, say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from glm5.serve.budgets import EACH, Budget
from glm5.text.values import JSON_TYPES, json_types, referred

_Tags = dict[str, frozenset[Any]]


class Exclusive:
    """Reads schemas inside a root, which outlives it. Raises `InputError` where that costs more than is left."""

    def __init__(self, root: Any, budget: Budget) -> None:
        self._root, self._budget = root, budget
        self._types: dict[int, frozenset[str]] = {}
        self._tags: dict[int, tuple[_Tags, frozenset[str]]] = {}
        """By the identity of a schema that is referred to."""

    def __call__(self, branches: Any) -> bool:
        """Whether surely no value is valid in two of the branches."""
        if not isinstance(branches, list):
            return False
        types = [self._may_be(branch) for branch in branches]
        shared = {kind for kind, count in Counter(kind for each in types for kind in each).items() if count > 1}
        if not shared:
            return True
        tagged = [each for each in types if "object" in each]
        if shared != {"object"} or any(each != {"object"} for each in tagged):
            return False
        objects = [branch for branch, each in zip(branches, types, strict=True) if "object" in each]
        return _told_apart([self._listed(branch) for branch in objects])

    def _may_be(self, schema: Any) -> frozenset[str]:
        """No value of another type is valid. Integers count as numbers."""
        if schema is False:
            return frozenset()
        found = JSON_TYPES - {"integer"}
        if not isinstance(schema, Mapping):
            return found
        self._budget.spend(EACH)
        if (declared := schema.get("type")) is not None:
            named = declared if isinstance(declared, list) else [declared]
            found &= {"number" if each == "integer" else each for each in named if isinstance(each, str)}
        for values in _values(schema):
            found &= frozenset().union(*map(json_types, values))
        for keyword in ("anyOf", "oneOf"):
            if isinstance(schema.get(keyword), list):
                found &= frozenset().union(*map(self._may_be, schema[keyword]))
        for branch in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
            found &= self._may_be(branch)
        target = self._behind(schema)
        if target is not None:
            if id(target) not in self._types:
                self._types[id(target)] = JSON_TYPES - {"integer"}  # while it is read, in a circle
                self._types[id(target)] = self._may_be(target)
            found &= self._types[id(target)]
        return found

    def _listed(self, schema: Any) -> tuple[_Tags, frozenset[str]]:
        """The values of the properties whose values are listed, and which properties an object must have."""
        schema = self._last(schema)
        if id(schema) not in self._tags:
            properties, required = schema.get("properties"), schema.get("required")
            tags: _Tags = {}
            for key, inner in properties.items() if isinstance(properties, Mapping) else ():
                self._budget.spend(EACH)
                for values in _values(self._last(inner)):
                    if all(value is None or isinstance(value, str | int | float) for value in values):
                        tags[key] = frozenset(map(_scalar, values))
            needed = [key for key in required if isinstance(key, str)] if isinstance(required, list) else []
            self._tags[id(schema)] = tags, frozenset(needed)
        self._budget.spend(sum(map(len, self._tags[id(schema)][0].values())))
        return self._tags[id(schema)]

    def _behind(self, schema: Mapping[str, Any]) -> Any:
        """What its reference leads to; None where it has none."""
        if not isinstance(reference := schema.get("$ref"), str):
            return None
        self._budget.spend(len(reference))
        return referred(reference, self._root)

    def _last(self, schema: Any) -> Mapping[str, Any]:
        """What a schema that is a reference leads to, some of them in a row."""
        for _ in range(8):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._behind(schema)
        return schema if isinstance(schema, Mapping) else _NOTHING


_NOTHING: Mapping[str, Any] = {}


def _told_apart(branches: list[tuple[_Tags, frozenset[str]]]) -> bool:
    """Whether one property has other values in each, and all must have it but one at most: a value of two branches
    would have it, and one value of both."""
    first, _ = branches[0]
    for key in set(first).intersection(*(tags for tags, _ in branches)):
        lists = [tags[key] for tags, _ in branches]
        bare = sum(key not in needed for _, needed in branches)
        if bare <= 1 and len(frozenset().union(*lists)) == sum(map(len, lists)):
            return True
    return False


def _values(schema: Mapping[str, Any]) -> Iterable[list[Any]]:
    if "const" in schema:
        yield [schema["const"]]
    if isinstance(listed := schema.get("enum"), list):
        yield listed


def _scalar(value: Any) -> Any:
    """As JSON Schema compares: 1 is 1.0, and neither is true."""
    return (type(value) is bool, value)
