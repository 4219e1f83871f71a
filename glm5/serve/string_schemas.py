"""What a JSON schema asks of a string: an argument that is one is bare text, which no `%json` of a grammar writes.

References, `allOf`, `anyOf` and `oneOf` are multiplied out into alternatives, each with plain conditions: a length,
patterns, or a list of values. What such conditions cannot say is collected by name, for a `strict` tool to refuse.
Every alternative is paid for out of a budget before it is made.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from glm5.serve.budgets import EACH, Budget
from glm5.serve.json_schemas import ANNOTATIONS, DEFINITIONS
from glm5.text.values import JSON_TYPES, json_types, referred

_COMBINED = frozenset({"$ref", "allOf", "anyOf", "oneOf"})
_UNSAID = frozenset({"not", "if"})
_MOST = 1024
"""Alternatives; a schema of a few references and lists of them may ask for thousands."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One way to be valid: all of these conditions, of which length and patterns are for strings alone."""

    types: frozenset[str] = JSON_TYPES
    low: int = 0
    high: float = math.inf
    patterns: tuple[str, ...] = ()
    values: Mapping[str, Any] | None = None
    """The only values, by their JSON; None: any."""

    def __and__(self, other: Alternative) -> Alternative:
        values = other.values if self.values is None else self.values
        if self.values is not None and other.values is not None:
            values = {text: value for text, value in self.values.items() if text in other.values}
        return Alternative(
            types=self.types & other.types, low=max(self.low, other.low), high=min(self.high, other.high),
            patterns=tuple(dict.fromkeys((*self.patterns, *other.patterns))), values=values,
        )  # fmt: skip

    @cached_property
    def weight(self) -> int:
        """What it costs to go over it once."""
        return EACH + sum(map(len, self.patterns)) + sum(map(len, self.values or ()))

    @cached_property
    def texts(self) -> tuple[str, ...] | None:
        """The only strings; None: any of the conditions."""
        if "string" not in self.types or self.low > self.high:
            return ()
        fits = lambda value: isinstance(value, str) and self.low <= len(value) <= self.high
        return None if self.values is None else tuple(filter(fits, self.values.values()))

    @property
    def others(self) -> frozenset[str]:
        """Types beside strings that this may be."""
        found = (
            self.types
            if self.values is None
            else self.types & frozenset().union(*map(json_types, self.values.values()))
        )
        return found - {"string"}


class StringSchema:
    """A schema inside a root, read for its strings. Raises `InputError` where that costs more than is left."""

    def __init__(self, schema: Any, root: Any, budget: Budget) -> None:
        self._root, self._budget = root, budget
        self._behind: dict[int, list[Alternative] | None] = {}
        """What references lead to, by the schema's identity; None while it is read."""
        self.asked: set[str] = set()
        """All that it asks of values, by keyword."""
        self.unheld: set[str] = set()
        """Of these, what the alternatives do not say."""
        self.alternatives = self._read(schema)
        if any(one.patterns and one.texts for one in self.alternatives):
            self.unheld.add("pattern")  # of listed values: expressions are the grammar's, and it has only their texts

    @property
    def possible(self) -> bool:
        """Whether a string may be valid: also where a branch says nothing, and no type beside it is a string's."""
        return any(one.texts != () for one in self.alternatives)

    def _read(self, schema: Any) -> list[Alternative]:
        self._budget.spend(EACH)
        if schema is False:
            return []
        if not isinstance(schema, Mapping):
            return [Alternative()]
        self.asked |= schema.keys() - ANNOTATIONS - DEFINITIONS - _COMBINED - {"format", "$id", "$anchor"}
        self.unheld |= schema.keys() & _UNSAID
        found = [self._own(schema)]
        for branches in self._combined(schema):
            if len(found) * len(branches) > _MOST:
                self.unheld.add("anyOf")
            pairs = itertools.islice(itertools.product(found, branches), _MOST)
            found = [both for one, other in pairs if (both := self._both(one, other)).types]
        return found

    def _both(self, one: Alternative, other: Alternative) -> Alternative:
        self._budget.spend(one.weight + other.weight)
        return one & other

    def _own(self, schema: Mapping[str, Any]) -> Alternative:
        """The conditions of the keywords that stand in the schema itself."""
        types: frozenset[str] = JSON_TYPES
        values: dict[str, Any] | None = None
        if (declared := schema.get("type")) is not None:
            types = frozenset(each for each in (declared if isinstance(declared, list) else [declared])
                              if isinstance(each, str)) & JSON_TYPES  # fmt: skip
            types |= {"integer"} if "number" in types else set()
        for keyword in ("enum", "const"):
            if keyword in schema:
                listed = schema[keyword] if keyword == "enum" else [schema[keyword]]
                values = {json.dumps(value): value for value in listed} if isinstance(listed, list) else {}
        low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        for keyword, length in (("minLength", low), ("maxLength", high)):
            if keyword in schema and (type(length) is not int or length < 0):
                self.unheld.add(keyword)
        if not isinstance(pattern := schema.get("pattern", ""), str):
            self.unheld.add("pattern")
        if "enum" in schema and "const" in schema:
            self.unheld.add("enum")
        own = Alternative(
            types=types, values=values,
            low=low if type(low) is int else 0, high=high if type(high) is int else math.inf,
            patterns=(pattern,) if isinstance(pattern, str) and pattern else (),
        )  # fmt: skip
        self._budget.spend(own.weight)
        return own

    def _combined(self, schema: Mapping[str, Any]) -> Iterator[list[Alternative]]:
        """Lists of alternatives, of each of which one must hold."""
        if "$ref" in schema:
            yield self._referred(schema["$ref"])
        for keyword in ("allOf", "anyOf", "oneOf"):
            if keyword not in schema:
                continue
            if not isinstance(schema[keyword], list):
                self.unheld.add(keyword)
                continue
            each = [self._read(branch) for branch in schema[keyword]]
            if keyword == "allOf":
                yield from each
                continue
            self._budget.spend(sum(one.weight for alternatives in each for one in alternatives))
            if keyword == "oneOf" and _overlap(each):
                self.unheld.add(keyword)
            yield [one for alternatives in each for one in alternatives]

    def _referred(self, reference: Any) -> list[Alternative]:
        target = referred(reference, self._root)
        self._budget.spend(len(str(reference)))
        if target is None or self._behind.get(id(target), ()) is None:  # nothing, or the schema itself
            self.unheld.add("$ref")
            return [Alternative()]
        if id(target) not in self._behind:
            self._behind[id(target)] = None
            self._behind[id(target)] = self._read(target)
        return self._behind[id(target)] or []


def _overlap(branches: list[list[Alternative]]) -> bool:
    """Whether a string may be of two branches, as far as is seen at once: any string and another, or the same text."""
    seen: set[str] = set()
    any_text = False
    for branch in branches:
        found = [one.texts for one in branch]
        texts = {text for each in found for text in each or ()}
        free = None in found
        if (free and (seen or any_text)) or (any_text and texts) or not seen.isdisjoint(texts):
            return True
        seen |= texts
        any_text = any_text or free
    return False
