"""Plain Python functions as tools: the JSON schema from the signature, the call from the model's JSON.

    def area(width: float, height: float) -> float:
        "The area of a rectangle."
        return width * height

The annotations become the schema (any type that pydantic knows), the docstring's first paragraph the description. What
goes wrong in a call (no such tool, arguments that do not fit, an exception) is told to the model as the result. Only
`EnvironmentFailure`, a lost connection (also where a client of HTTP has made another exception of it) and an exhausted
memory are the infrastructure's and go up. A refused one that a client has made another exception of is a message: the
model may have chosen the address. A tool for which a lost connection is an answer too catches it, and raises or returns
what it has to say (`raise ... from None`).
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from glm5.envs.protocol import EnvironmentFailure, Message, Tool
from glm5.envs.threads import in_own_thread
from glm5.errors import InputError, did_you_mean

Function = Callable[..., Any]
LONGEST = 20_000
"""Characters of a result; the rest is cut and counted."""
LOST = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
"""What becomes of a connection that there was."""


class Toolbox:
    """Some functions with their schemas. Functions may be async; the others run in threads of their own."""

    def __init__(self, functions: Sequence[Function], *, longest: int = LONGEST) -> None:
        self._functions = {function.__name__: function for function in functions}
        if len(self._functions) < len(functions):
            raise InputError("two tools have the same name; give every function its own.")
        self._arguments = {name: _arguments(function) for name, function in self._functions.items()}
        self._longest = longest
        self.tools: tuple[Tool, ...] = tuple(map(self._described, self._functions))

    async def answer(self, calls: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
        """Runs the tool calls of one message side by side; the results in the order of the calls. Where one fails, the
        others are called off."""
        running = [asyncio.ensure_future(self._run(call["function"])) for call in calls]
        try:
            contents = await asyncio.gather(*running)
        finally:
            for each in running:
                each.cancel()
        return tuple(
            {"role": "tool", "content": content, **({"tool_call_id": call["id"]} if call.get("id") else {})}
            for call, content in zip(calls, contents, strict=True)
        )

    async def _run(self, call: Mapping[str, Any]) -> str:
        name, given = call["name"], call.get("arguments") or "{}"
        if name not in self._functions:
            return _error(f"there is no tool {name}.{did_you_mean(name, self._functions)}")
        try:
            checked = self._arguments[name].model_validate(json.loads(given) if isinstance(given, str) else given)
            fields = type(checked).model_fields
            arguments = {str(fields[place].alias): getattr(checked, place) for place in fields}
        except ValidationError as error:
            return _error("; ".join(_said(one) for one in error.errors()))
        except (ValueError, RecursionError):  # also a number of thousands of digits, and lists in lists without end
            return _error("the arguments are no JSON")
        function = self._functions[name]
        try:
            if inspect.iscoroutinefunction(function):
                result = await function(**arguments)
            else:
                result = await in_own_thread(function, **arguments)
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except EnvironmentFailure:
            raise
        except MemoryError as error:
            raise EnvironmentFailure(f"the tool {name} ran out of memory", "crash") from error
        except (Exception, SystemExit) as error:
            if _lost_connection(error):
                raise EnvironmentFailure(f"the tool {name} lost its connection: {error!r}", "unreachable") from error
            return _error(str(error) or type(error).__name__)
        return self._cut(text)

    def _cut(self, text: str) -> str:
        more = len(text) - self._longest
        return text if more <= 0 else f"{text[: self._longest]}... ({more} more characters)"

    def _described(self, name: str) -> Tool:
        schema = _plain(self._arguments[name].model_json_schema())
        schema.pop("additionalProperties", None)
        description = " ".join((inspect.getdoc(self._functions[name]) or "").split("\n\n")[0].split())
        function = {"name": name, "description": description, "parameters": schema}
        return {"type": "function", "function": function}


def _arguments(function: Function) -> type[BaseModel]:
    """The parameters of a function as a model; InputError for one that a model cannot call by names.

    They are aliases of its fields, since pydantic takes some names (`json`, `_x`) for its own.
    """
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in hints or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InputError(f"parameter {name} of the tool {function.__name__} needs a type and a name of its own.")
        hint, default = hints[name], parameter.default
        if isinstance(default, FieldInfo):  # says a default, a description, bounds; the later one says the names
            field = (Annotated[hint, default], Field(alias=name))
        else:
            field = (hint, Field(... if default is parameter.empty else default, alias=name))
        fields[f"field_{len(fields)}"] = field
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid", strict=False), **fields)


def _lost_connection(error: BaseException) -> bool:
    """Whether it is one, or was raised because of one that broke, which a client may have wrapped several times and
    hidden."""
    before = error.__cause__ if error.__suppress_context__ else error.__context__
    while before is not None and not isinstance(before, LOST):
        before = before.__cause__ or before.__context__
    return isinstance(error, ConnectionError) or before is not None


def _plain(schema: Any) -> Any:
    """Without the titles that pydantic makes of the names; a property may be called "title"."""
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    named = ("properties", "$defs")
    return {
        key: {name: _plain(one) for name, one in value.items()} if key in named else _plain(value)
        for key, value in schema.items()
        if key != "title"
    }


def _said(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    return f"{place}: {error['msg']}" if place else str(error["msg"])


def _error(sentence: str) -> str:
    return json.dumps({"error": sentence}, ensure_ascii=False)
