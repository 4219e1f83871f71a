"""Anthropic's messages as the chat template's: pure functions, no model.

* `system` and texts are joined; a `tool_result` becomes a message of the role `tool`, in the order of the calls: to
  the template nothing else tells results apart. A result marked `is_error` that does not say so says it first. One
  of `tool_reference` blocks shows tools that were deferred.
* `thinking` blocks become the turn's reasoning and are kept in all turns; signatures are not checked. Redacted ones,
  which this server never makes, are left out.
* A last message of the assistant is the beginning of the answer (prefill); it needs thinking to be off.
* Claude Code's billing line, which differs in each request, is left out: it would make every prefix cache useless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glm5.errors import TextError
from glm5.serve.anthropic_schema import AnthropicMessage, Content, CountTokensRequest
from glm5.text.messages import results_in_order

BILLING = "x-anthropic-billing-header"
Message = dict[str, Any]
Block = dict[str, Any]


def chat_messages(request: CountTokensRequest) -> tuple[list[Message], str]:
    """Messages for the template, and the text that the answer begins with. Raises `TextError`."""
    messages: list[Message] = []
    if system := [text for text in _texts(request.system or [], "system") if not text.startswith(BILLING)]:
        messages.append({"role": "system", "content": "\n".join(system)})
    given = list(request.messages)
    prefill = ""
    if given[-1].role == "assistant":
        prefill = _prefill(given.pop(), request)
    for number, message in enumerate(given):
        where = f"messages.{number}"
        if message.role == "system":
            messages.append({"role": "system", "content": "\n".join(_texts(message.content, where))})
        elif message.role == "assistant":
            turn = _assistant(_blocks(message.content), where)
            earlier = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
            if earlier:
                _join(earlier, turn)
            else:
                messages.append(turn)
        else:
            _add_user(messages, _blocks(message.content), where)
    if not any(message["role"] != "system" for message in messages):
        raise TextError("messages: there is nothing to answer; send a message of the user.")
    _check_references(messages, {tool.name for tool in request.tools})
    return [dict(message) for message in results_in_order(messages)], prefill


def _add_user(messages: list[Message], blocks: Sequence[Block], where: str) -> None:
    """Results, then what the user says."""
    results = [block for block in blocks if block.get("type") == "tool_result"]
    messages += [
        {"role": "tool", "tool_call_id": _string(block, "tool_use_id", where), "content": _result(block, where)}
        for block in results
    ]
    said = _texts([block for block in blocks if block.get("type") != "tool_result"], where)
    if not said and results:
        return
    if messages and messages[-1]["role"] == "user":
        messages[-1]["content"] += "\n" + "\n".join(said)
    else:
        messages.append({"role": "user", "content": "\n".join(said)})


def _result(block: Block, where: str) -> str | list[Block]:
    """The text of a result; or, for the template, the deferred tools that it refers to."""
    parts = block.get("content") or []
    if isinstance(parts, list) and any(isinstance(one, dict) and one.get("type") == "tool_reference" for one in parts):
        if not all(isinstance(one, dict) and one.get("type") == "tool_reference" for one in parts):
            raise TextError(f"{where}: a tool_result holds tool_reference blocks alone or none; send its text apart.")
        return [{"type": "tool_reference", "name": _string(one, "tool_name", where)} for one in parts]
    text = "\n".join(_texts(block.get("content") or [], f"{where}: the tool_result"))
    return f"Error: {text}" if block.get("is_error") is True and "error" not in text[:40].lower() else text


def _check_references(messages: Sequence[Message], names: set[str]) -> None:
    for part in (part for message in messages if isinstance(message["content"], list) for part in message["content"]):
        if part["name"] not in names:
            raise TextError(f"A tool_reference names the tool {part['name']!r}; send it in tools, with defer_loading.")


def _assistant(blocks: Sequence[Block], where: str) -> Message:
    turn: Message = {"role": "assistant", "reasoning_content": None, "content": "", "tool_calls": []}
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            turn["reasoning_content"] = (turn["reasoning_content"] or "") + _string(block, "thinking", where)
        elif kind == "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise TextError(f"{where}: the input of a tool_use must be an object.")
            name, call_id = _string(block, "name", where), _string(block, "id", where)
            turn["tool_calls"].append(
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            )
        elif kind != "redacted_thinking":
            turn["content"] += "".join(_texts([block], where))
    return turn


def _join(first: Message, second: Message) -> None:
    """Two turns of the assistant in a row are one."""
    if second["reasoning_content"] is not None:
        first["reasoning_content"] = (first["reasoning_content"] or "") + second["reasoning_content"]
    first["content"] += second["content"]
    first["tool_calls"] += second["tool_calls"]


def _prefill(message: AnthropicMessage, request: CountTokensRequest) -> str:
    blocks = _blocks(message.content)
    if request.enable_thinking or any(block.get("type") != "text" for block in blocks):
        raise TextError(
            "messages: the last one is of the assistant. It may begin the answer with text when thinking is disabled; "
            "otherwise end with a message of the user."
        )
    text = "".join(_texts(blocks, "the last message"))
    if text != text.rstrip():
        raise TextError("messages: the last one, which the answer goes on from, ends in white space; remove it.")
    return text


def _blocks(content: Content) -> list[Block]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(content: Content, where: str) -> list[str]:
    """The texts of text blocks. Raises `TextError` for any other block."""
    texts = []
    for block in _blocks(content) if isinstance(content, str | list) else [content]:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "image":
            raise TextError(f"{where} holds an image, and GLM-5 reads text only; describe it in words.")
        if kind != "text":
            raise TextError(f"{where} holds a block of type {kind!r}; GLM-5 reads text only, so send its text.")
        texts.append(_string(block, "text", where))
    return texts


def _string(block: Block, name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str) or (not value and name in ("id", "name")):
        raise TextError(f"{where}: a block of type {block.get('type')!r} needs {name!r}, a string.")
    return value
