"""Random schemas, random walks: what is taken as strict is valid, and what is not taken is refused with a sentence."""

import json
import random
from contextlib import suppress

import jsonschema
import pytest
from grammar_walks import Walks

from glm5.errors import InputError

PLAIN = [{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")] + [{}, True]
PATTERNS = ["^[a-c]*$", "a", "^x", "1$", "^[0-9]{1,3}$", "^(true|null)$"]
VALUES = ["x", "y", "1", "true", "null", "long text", 1, 2, None, True, 1.5, ["a"], {"a": 1}]
REFERENCES = ["#/$defs/A", "#/$defs/B", "#", "#/$defs/C/anyOf/0"]
KINDS = ["string", "string", "number", "object", "array", "anyOf", "anyOf", "allOf", "oneOf", "$ref", "$ref", "values",
         "types", "types"]  # fmt: skip


class Schemas:
    """Schemas of one stream of random numbers."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def tool(self):
        """Parameters of a tool, with definitions that may lead in circles."""
        shared = {name: self.schema(1) for name in "AB"} | {"C": {"anyOf": [self.schema(1), self.schema(1)]}}
        more = self.random.choice([False, False, True, self.schema(2)])
        return {**self.listed(["p", "q", "r"], 0), "additionalProperties": more, "$defs": shared}

    def listed(self, names, depth):
        """An object of some properties."""
        names = self.random.sample(names, self.random.randint(depth > 0, len(names)))
        required = [name for name in names if self.random.random() < 0.7]
        return {"type": "object", "properties": {name: self.schema(depth + 1) for name in names}, "required": required}

    def schema(self, depth):
        """One of any kind; now and then with conditions of another kind beside its own."""
        draw, kind = self.random.random, self.random.choice(KINDS)
        if depth > 3 or draw() < 0.15:
            return self.random.choice(PLAIN)
        made = self.of(kind, depth)
        if kind == "string" or draw() < 0.15:
            made |= {"minLength": self.random.randint(0, 2)} if draw() < 0.3 else {}
            made |= {"maxLength": self.random.randint(1, 4)} if draw() < 0.5 else {}
            made |= {"pattern": self.random.choice(PATTERNS)} if draw() < 0.3 else {}
        made |= {"type": self.random.choice(["string", ["string", "null"], "integer"])} if draw() < 0.1 else {}
        return made | ({"description": "d"} if draw() < 0.1 else {})

    def of(self, kind, depth):
        """The keywords of a kind."""
        draw = self.random
        if kind == "object":
            return self.listed(["a", "b"], depth) | ({"additionalProperties": False} if draw.random() < 0.7 else {})
        if kind in ("anyOf", "allOf", "oneOf"):
            return {kind: [self.schema(depth + 1) for _ in range(draw.randint(1, 3))]}
        return {
            "string": {"type": "string"},
            "number": {"type": draw.choice(["integer", "number"]), "minimum": draw.randint(-3, 3), "maximum": 5},
            "array": {"type": "array", "items": self.schema(depth + 1), "maxItems": draw.randint(0, 2)},
            "$ref": {"$ref": draw.choice(REFERENCES)},
            "values": {"enum": draw.sample(VALUES, draw.randint(1, 4))},
            "types": {"type": draw.sample(["string", "integer", "null", "boolean", "array", "object"], 2)},
        }[kind]


@pytest.fixture(scope="module")
def walks():
    found = Walks()
    yield found
    found.compiler.close()


def valid(texts, schema):
    """How many texts there are, all of which fit. `jsonschema` cannot follow some circles."""
    for text in texts:
        try:
            jsonschema.validate(json.loads(text), schema)
        except RecursionError:
            return 0
    return len(texts)


def check(walks, seed):
    """How many calls and answers of one schema were made; none where it is refused."""
    schema = Schemas(seed).tool()
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    found = 0
    for texts in (lambda: walks.calls(tool, 2), lambda: walks.answers(schema, 2)):
        with suppress(InputError):  # refused
            found += valid(texts(), schema)
    return found


def test_random_schemas_are_held_or_refused(walks):
    assert sum(check(walks, seed) for seed in range(15)) > 15


@pytest.mark.soak
def test_many_random_schemas_are_held_or_refused(walks):
    found = sum(check(walks, seed) for seed in range(100, 1100))
    print(f"{found} calls and answers of 1,000 schemas are valid")
    assert found > 1000
