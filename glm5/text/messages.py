"""Chat messages and tools as a template may see them: checked, plain, and disarmed on request.

`prepare_messages` turns what clients really send into what every GLM template can render: lists of text parts become
one string (templates of other servers ignore tool results that are lists), a missing assistant content becomes an empty
string, `reasoning` is read as `reasoning_content`, and tool-call arguments given as a JSON string become an object.

`disarm` makes untrusted text harmless: in every string it breaks each occurrence of a special token with a marker
character, which survives any template. The tokenizer then knows the special tokens that the template wrote from the
ones that a user, a tool or a web page wrote, and encodes the latter as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping, Sequence
from itertools import groupby
from typing import Any

from glm5.errors import TextError, did_you_mean

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")

# Unicode reserves these 32 code points for a program's own use; text that is meant to be read does not contain them.
_MARKERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


def prepare_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages with plain contents; keys that are not named above stay. Raises `TextError`."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise TextError("a conversation is a list of at least one message such as {'role': 'user', 'content': 'Hi'}")
    return [_prepare(message, f"message {i}") for i, message in enumerate(messages)]


def prepare_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Copies of the tools: OpenAI's envelope or the bare function. Raises `TextError` for anything without a name."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence):
        raise TextError(f"the tools are of type {type(tools).__name__}; give a list of them")
    prepared = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TextError(
                f"tool {i} has no name: give {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}"
            )
        prepared.append(dict(tool))
    return prepared


def results_in_order(messages: Sequence[Message]) -> list[Message]:
    """The messages with the results of tools in the order of the calls that they answer.

    The template shows no ids, so the order alone tells the model which result is whose. Each run of messages of the
    role "tool" is sorted by where their calls stand in the conversation before it; a run that names no `tool_call_id`
    stays as it is. Raises `TextError` for a result that answers no call before it, and for one without an id beside
    others that have theirs.
    """
    ordered: list[Message] = []
    places: dict[str, int] = {}  # of the last call of each id, as it is spelled; any JSON may stand there
    made = 0
    for role, run in groupby(messages, _role):
        group = list(run)
        if role == "assistant":
            for call in (call for message in group for call in message.get("tool_calls") or []):
                if isinstance(call, Mapping):
                    places[repr(call.get("id"))] = made = made + 1
        elif role == "tool" and any(message.get("tool_call_id") is not None for message in group):
            _check_results(group, places)
            group.sort(key=lambda message: places[repr(message["tool_call_id"])])
        ordered += group
    return ordered


def _check_results(results: Sequence[Message], known: Container[str]) -> None:
    for name in (result.get("tool_call_id") for result in results):
        if name is None:
            raise TextError(
                "a tool result has no tool_call_id and stands beside results that have one; "
                "give each the id of the call that it answers"
            )
        if repr(name) not in known:
            raise TextError(
                f"the tool result for {name!r} answers no call before it; send the call and its result with the same id"
            )


def split_reasoning(content: str) -> tuple[str | None, str]:
    """Reasoning (None without a `</think>`) and answer of an assistant text, as the published templates split it."""
    if "</think>" not in content:
        return None, content
    parts = content.split("</think>")
    return parts[0].split("<think>")[-1], parts[-1]


def disarm(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, special: re.Pattern[str]) -> tuple:
    """Messages and tools with every special token broken, and the marker that breaks them.

    The reasoning inside an assistant's content is split off first, because after this no tag is left to split at.
    """
    for message in messages:
        if message["role"] == "assistant" and not isinstance(message.get("reasoning_content"), str):
            message["reasoning_content"], message["content"] = split_reasoning(message["content"])
    try:
        marker = unused_marker(messages, tools)
        return _broken(messages, special, marker), _broken(tools, special, marker), marker
    except RecursionError:
        raise TextError("a message or a tool is nested too deeply; send a flatter one") from None


def unused_marker(messages: Any, tools: Any) -> str:
    """A character that is in none of the texts. Raises `TextError` when there is none."""
    try:
        everything = json.dumps([messages, tools], ensure_ascii=False, default=str)
    except RecursionError:
        raise TextError("a message or a tool is nested too deeply; send a flatter one") from None
    marker = next((m for m in _MARKERS if m not in everything), None)
    if marker is None:
        raise TextError("the messages use all 32 Unicode noncharacters; remove them to encode with escape_special")
    return marker


def _broken(value: Any, special: re.Pattern[str], marker: str) -> Any:
    if isinstance(value, str):
        return special.sub(lambda found: found[0][0] + marker + found[0][1:], value)
    if isinstance(value, Mapping):
        return {_broken(k, special, marker): _broken(v, special, marker) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_broken(item, special, marker) for item in value]
    return value


def _prepare(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TextError(f"{where} is a {type(message).__name__}; give a dict with 'role' and 'content'")
    role = message.get("role")
    if role not in ROLES:
        raise TextError(
            f"{where} has the role {role!r}; use one of {', '.join(ROLES)}.{did_you_mean(str(role), ROLES)}"
        )
    prepared = {**message, "content": _content(message.get("content"), role, where)}
    if role == "assistant":
        if prepared.get("reasoning_content") is None and isinstance(message.get("reasoning"), str):
            prepared["reasoning_content"] = message["reasoning"]
        calls = message.get("tool_calls") or []
        if not isinstance(calls, Sequence):
            raise TextError(f"the tool_calls of {where} are of type {type(calls).__name__}; give a list of calls")
        prepared["tool_calls"] = [_tool_call(call, where) for call in calls]
    return prepared


def _content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, (list, tuple)):
        raise TextError(f"the content of {where} ({role}) is a {type(content).__name__}; give a string (json.dumps it)")
    if role == "tool" and content and all(_kind(part) == "tool_reference" for part in content):
        return [dict(part) for part in content]
    return "".join(_text(part, f"{where} ({role})") for part in content)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _text(part: Any, where: str) -> str:
    """The text of one part of a content."""
    text = part.get("text") if _kind(part) == "text" else part
    if isinstance(text, str):
        return text
    if _kind(part) == "text" or not isinstance(part, Mapping):
        raise TextError(f"{where} has the part {part!r}; a part is {{'type': 'text', 'text': ...}} or a string")
    raise TextError(f"{where} has a part of type {_kind(part)!r}; GLM-5 reads text only")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TextError(f"a tool call of {where} has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
            raise TextError(f"{where} calls {function['name']!r} with arguments that are not JSON: {error}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise TextError(f"{where} calls {function['name']!r} with arguments that are not a JSON object")
    plain = {**function, "arguments": dict(arguments)}
    return {**call, "function": plain} if "function" in call else plain
