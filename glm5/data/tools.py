"""A handful of small tools that training conversations call, with their JSON schemas and what they do.

Every tool is a pure function of its arguments, so the result that a conversation shows is the result that running the
call gives. `run_tool` checks the arguments against the schema first (the part of JSON Schema that these tools use:
types, enumerations, required names, no others) and answers a wrong call with a sentence, as a server would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

WEATHERS = ("sunny", "rainy", "windy", "cloudy", "foggy", "snowy")


def _tool(name: str, description: str, **properties: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


CALCULATOR = _tool(
    "calculator", "Calculates with two whole numbers.",
    a={"type": "integer"}, operation={"type": "string", "enum": ["plus", "minus", "times"]}, b={"type": "integer"},
)  # fmt: skip
WEATHER = _tool("get_weather", "The weather in a town today.", town={"type": "string"})
ALARM = _tool("set_alarm", "Sets an alarm.", hour={"type": "integer"}, minute={"type": "integer"})
SPELLER = _tool("count_letters", "Counts the letters of a word.", word={"type": "string"})
TOOLS: tuple[dict[str, Any], ...] = (CALCULATOR, WEATHER, ALARM, SPELLER)


def problem_with(tool: Mapping[str, Any], arguments: Any) -> str | None:
    """What is wrong with a call's arguments under the tool's schema, as a short sentence; None for a valid call."""
    parameters = tool["function"]["parameters"]
    if not isinstance(arguments, Mapping):
        return "the arguments are no object"
    for name in parameters["required"]:
        if name not in arguments:
            return f"{name} is missing"
    for name, value in arguments.items():
        schema = parameters["properties"].get(name)
        if schema is None:
            return f"there is no argument {name}"
        wanted = {"string": str, "integer": int}[schema["type"]]
        if not isinstance(value, wanted) or isinstance(value, bool):
            return f"{name} must be {'a' if wanted is str else 'an'} {schema['type']}"
        if value not in schema.get("enum", [value]):
            return f"{name} must be one of {', '.join(schema['enum'])}"
    return None


def run_tool(name: str, arguments: Mapping[str, Any]) -> str:
    """The result of a call as JSON text: `{"result": ...}`, or `{"error": ...}` for a call that is not valid."""
    tool = next((tool for tool in TOOLS if tool["function"]["name"] == name), None)
    problem = "there is no such tool" if tool is None else problem_with(tool, arguments)
    if problem is not None:
        return json.dumps({"error": problem})
    return json.dumps({"result": _result(name, arguments)})


def _result(name: str, arguments: Mapping[str, Any]) -> Any:
    if name == "calculator":
        a, b = arguments["a"], arguments["b"]
        return {"plus": a + b, "minus": a - b, "times": a * b}[arguments["operation"]]
    if name == "get_weather":
        return WEATHERS[int(hashlib.sha256(arguments["town"].encode()).hexdigest()[:8], 16) % len(WEATHERS)]
    if name == "set_alarm":
        return f"{arguments['hour']:02}:{arguments['minute']:02}"
    return len(arguments["word"])
