"""The schemas that pydantic, `openai.pydantic_function_tool` and Zod write: held to the letter, whatever is written."""

import enum
import json
import uuid
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar

import jsonschema
import openai
import pytest
from grammar_walks import Walks
from pydantic import AnyUrl, BaseModel, Field, SecretStr
from typing_extensions import TypeAliasType

Short = Annotated[str, Field(max_length=5)]
Code = TypeAliasType("Code", Annotated[str, Field(pattern="^[a-z]{2}$")])
Json = TypeAliasType("Json", "dict[str, Json] | list[Json] | str | int | bool | None")
T = TypeVar("T")


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Leaf(BaseModel):
    """A leaf."""

    name: Short
    number: int = 3


class Nested(BaseModel):
    leaf: Leaf = Field(description="the leaf")
    leaves: Annotated[list[Leaf], Field(min_length=1, max_length=2)]
    maybe: Leaf | None = None
    color: Color = Field(Color.RED, description="its color")
    colors: dict[Color, int]
    tags: dict[Annotated[str, Field(pattern="^[a-z]+$")], bool]


class Tree(BaseModel):
    value: Short
    children: Annotated[list["Tree"], Field(max_length=2)]


class Linked(BaseModel):
    word: Short | None
    next: "Linked | None" = None


class Strings(BaseModel):
    code: Code
    either: Code | int
    maybe: Code | None = Field(None, description="a code")
    short: Code = Field(max_length=9)
    listed: Literal["x", "12", 1, None]
    page: AnyUrl
    key: SecretStr
    id: uuid.UUID
    day: date | None
    price: Decimal


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    bark: Short


class Unions(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    pets: Annotated[list[Annotated[Cat | Dog, Field(discriminator="kind")]], Field(max_length=2)]
    mixed: Leaf | Short | None
    more: str | list[Short]
    pair: tuple[int, Short]
    anything: Any


class Box(BaseModel, Generic[T]):
    item: T


class Boxes(BaseModel):
    number: Box[int]
    leaf: Box[Leaf]
    json_: Json


MODELS = [Nested, Tree, Linked, Strings, Unions, Boxes]
RAW = {
    "a circle to the whole": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["a", "next"], "additionalProperties": False,
    },
    "references into properties": {
        "$schema": "http://json-schema.org/draft-07/schema#", "type": "object",
        "properties": {
            "first": {"type": "object", "properties": {"b": {"type": "string", "maxLength": 3}}, "required": ["b"],
                      "additionalProperties": False},
            "second": {"$ref": "#/properties/first"}, "third": {"$ref": "#/properties/first/properties/b"},
            "either": {"anyOf": [{"type": "string", "minLength": 2, "maxLength": 4}, {"type": "null"}]},
            "other": {"$ref": "#/properties/either/anyOf/0", "maxLength": 2},
        },
        "required": ["first", "second", "third", "other"], "additionalProperties": False,
    },
    "definitions below the top": {
        "type": "object",
        "properties": {"a": {"type": "object", "$defs": {"N": {"type": "integer", "maximum": 9}},
                             "properties": {"n": {"$ref": "#/properties/a/$defs/N"}}, "required": ["n"]},
                       "b": {"$ref": "#/$defs/My%20N", "minimum": 3}, "$ref": {"const": 3}},
        "required": ["a", "b"], "$defs": {"My N": {"type": "integer", "maximum": 9}},
    },
    "strings of several schemas": {
        "type": "object",
        "properties": {
            "a": {"allOf": [{"$ref": "#/$defs/Short"}], "default": "x", "minLength": 2},
            "b": {"allOf": [{"pattern": "^[a-c]*$"}, {"pattern": "b"}], "type": "string", "maxLength": 4},
            "c": {"oneOf": [{"$ref": "#/$defs/Short"}, {"type": "null"}]},
            "d": {"type": ["string", "null"], "anyOf": [{"enum": ["c", "toolong", 5]}, {"type": "null"}]},
            "e": {"enum": ["x", "long"], "maxLength": 2},
            "f": {"oneOf": [{"const": "x", "title": "X"}, {"const": "y", "title": "Y"}]},
        },
        "required": ["a", "b", "c", "d", "e", "f"], "$defs": {"Short": {"type": "string", "maxLength": 3}},
    },
    "a branch that takes anything": {
        "type": "object",
        "properties": {"a": {"anyOf": [{}, {"type": "null"}]},
                       "b": {"anyOf": [True, {"type": "integer", "minimum": 5}], "pattern": "^x", "maxLength": 4}},
        "required": ["a", "b"],
    },
    "what asks for nothing": {
        "type": "object", "x-order": 1,
        "properties": {
            "record": {"type": "object", "propertyNames": {"type": "string"},
                       "additionalProperties": {"type": "number"}},
            "list": {"type": "array", "items": {"type": "string", "format": "idn-email"}, "uniqueItems": False},
            "one": {"type": "array", "items": {"type": "integer", "format": "int32"}, "maxItems": 1,
                    "uniqueItems": True},
        },
        "required": ["record", "list", "one"], "additionalProperties": False,
    },
}  # fmt: skip
SHAPES = {
    **{f"{model.__name__}, pydantic's": model.model_json_schema() for model in MODELS},
    **{f"{model.__name__}, openai's": openai.pydantic_function_tool(model)["function"]["parameters"]
       for model in MODELS},
    **RAW,
}  # fmt: skip


@pytest.fixture(scope="module")
def walks():
    found = Walks()
    yield found
    found.compiler.close()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_usual_shape_is_held(walks, shape):
    schema = SHAPES[shape]
    jsonschema.Draft202012Validator.check_schema(schema)
    for strict in (True, False):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}
        calls = walks.calls(tool, 8)
        assert calls
        for arguments in calls:
            jsonschema.validate(json.loads(arguments), schema)
    answers = walks.answers(schema, 8)
    assert answers
    for answer in answers:
        jsonschema.validate(json.loads(answer), schema)
