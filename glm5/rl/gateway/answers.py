"""Which messages of a conversation are answers that were sampled in this session: recognised by what they say.

A client sends back text. An assistant message is an answer of ours if its content and its calls (names and arguments)
are those that we sent, and its reasoning, where it has one, is too; a message without reasoning is an answer whose
thought was stripped. Of several such answers the one that was given to the same conversation counts, then the one
whose calls have the same identities, then the newest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from glm5.errors import TextError
from glm5.text import Written
from glm5.text.messages import prepare_messages

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Known:
    """An answer, what it was given to, and its tokens."""

    context: str
    reasoning: str | None
    call_ids: tuple[str, ...]
    written: Written


class Answers:
    """The answers of one session."""

    def __init__(self) -> None:
        self._known: dict[str, list[Known]] = {}

    def add(self, messages: Sequence[Message], answer: Message, written: Written) -> None:
        """An answer to a conversation, as the client read it."""
        context = _contexts(prepare_messages(messages))[-1]
        (plain,) = prepare_messages([answer])
        known = Known(context, plain.get("reasoning_content"), _call_ids(plain), written)
        self._known.setdefault(_key(plain), []).append(known)

    def written(self, messages: Sequence[Message]) -> dict[int, Written]:
        """The tokens of the answers among the messages, by their number. What cannot be read has none."""
        if not self._known:
            return {}
        try:
            plain = prepare_messages(messages)
        except TextError:  # said again, and better, where the prompt is made
            return {}
        contexts = _contexts(plain)
        found = {}
        for number, message in enumerate(plain):
            if message["role"] == "assistant" and (known := self._find(message, contexts[number])):
                found[number] = known.written
        return found

    def _find(self, message: Message, context: str) -> Known | None:
        thought, call_ids = message.get("reasoning_content"), _call_ids(message)
        same = [k for k in self._known.get(_key(message), ()) if thought is None or k.reasoning == thought]
        ranked = [(k.context == context, k.call_ids == call_ids, place) for place, k in enumerate(same)]
        return same[max(ranked)[2]] if ranked else None


def _key(message: Message) -> str:
    """What a message says, reasoning aside. White space around it is the parser's or the template's business."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    said = [(call["name"], call["arguments"]) for call in calls]
    return _digest([message["role"], _content(message), said])


def _contexts(messages: Sequence[Message]) -> list[str]:
    """For each number of messages from 0 to all: what was said so far, reasoning aside."""
    contexts = [""]
    for message in messages:
        contexts.append(_digest([contexts[-1], _key(message)]))
    return contexts


def _content(message: Message) -> Any:
    content = message["content"]
    return content.strip() if isinstance(content, str) else content


def _call_ids(message: Message) -> tuple[str, ...]:
    """Without what each protocol puts before them."""
    ids = [str(call.get("id", "")) for call in message.get("tool_calls") or ()]
    return tuple(call_id.removeprefix("toolu_").removeprefix("call_") for call_id in ids)


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
