"""`strict: true` on a tool: its calls have arguments of its schema, whatever the model would like.

The rules of `tool_rules` hold a part of JSON Schema to the letter; llguidance holds, or refuses, what stands inside an
argument that is JSON. What neither would hold is refused here, with a sentence, before anything is sampled. One thing
is held by nobody: inside JSON, an object that declares a key and takes others too may get that key a second time,
spelled by an escape (`"\\u006b"` for `"k"`); `additionalProperties: false` closes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm5.errors import InputError
from glm5.serve.budgets import Budget
from glm5.serve.json_schemas import ANNOTATIONS, DEFINITIONS
from glm5.serve.string_schemas import StringSchema
from glm5.text.values import at_top, schema_types

_TOP = ANNOTATIONS | DEFINITIONS | {"type", "properties", "required", "additionalProperties", "$id", "$anchor"}


def is_strict(tool: Mapping[str, Any]) -> bool:
    """Whether a tool (OpenAI's envelope or the bare function) is."""
    return tool.get("function", tool).get("strict") is True


def check_strict(name: str, parameters: Any, budget: Budget) -> None:
    """Raises `InputError` for parameters whose calls could be wrong, as far as the rules for their JSON do not."""
    if not isinstance(parameters, Mapping):
        raise InputError(f"The tool {name!r} has parameters that are no JSON schema; give an object.")
    top = at_top(parameters)
    if top.get("type", "object") != "object":
        raise InputError(f"The parameters of the strict tool {name!r} must be of the type object.")
    _refuse({keyword for keyword in top if keyword not in _TOP and not _own(keyword)}, f"The strict tool {name!r}")
    properties = top.get("properties", {})
    for key, schema in properties.items() if isinstance(properties, Mapping) else ():
        _check(schema, parameters, budget, f"The argument {key!r} of the strict tool {name!r}")
    if isinstance(more := top.get("additionalProperties"), Mapping):
        _check(more, parameters, budget, f"additionalProperties of the strict tool {name!r}")


def _check(schema: Any, root: Mapping[str, Any], budget: Budget, where: str) -> None:
    """Only where an argument may be a string do our own rules write it."""
    types, strings = schema_types(schema, root, budget.spend), StringSchema(schema, root, budget)
    if types and not strings.possible:
        return
    _refuse(strings.unheld, where)
    if not types and any(not _own(keyword) for keyword in strings.asked):
        raise InputError(f"{where} needs a type: its schema would not be held without one.")


def _own(keyword: str) -> bool:
    """Whether a keyword is a producer's own, which says nothing about values."""
    return keyword.startswith(("x-", "x_"))


def _refuse(keywords: set[str], where: str) -> None:
    if keywords:
        raise InputError(f"{where} uses {min(keywords)!r}, which is not held to the letter; leave it out, or strict.")
