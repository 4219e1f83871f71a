"""Prompts in which earlier answers stand as the tokens that were sampled, not as their text tokenised again.

A text can be cut into tokens in many ways, and a model does not always write the way that a tokenizer reads: an answer
that goes through text comes back as other tokens, without the white space that a parser drops. So the conversation is
rendered with a hole for the reasoning and a hole for the rest of each answer whose tokens are known, and the holes are
filled with those tokens. Where the template keeps a hole is where it wants the part: an answer whose thought the
template clears, or the client dropped, is filled with what came after the thought.

What cannot be filled like that (an answer cut inside its thought that is to be shown without it; a template that opens
the answer in another way than the prompt that it answered) is rendered as text, as `apply_chat_template` does it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm5.text.messages import unused_marker
from glm5.text.tokenizer import Tokenizer

THINK_END = "</think>"


@dataclass(frozen=True, slots=True)
class Written:
    """An answer as a model wrote it."""

    opening: int
    """The last token of its prompt: the tag that the answer began behind."""
    token_ids: tuple[int, ...]
    """All that was sampled; the token that ended the turn may be among them."""


def spliced_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    written: Mapping[int, Written],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    enable_thinking: bool = True,
    clear_thinking: bool | None = None,
    reasoning_effort: str | None = None,
) -> list[int]:
    """The prompt of a conversation; `written`: by number of the message, the answers whose tokens are known.

    A message with reasoning is filled with all of its tokens, one without reasoning with what follows the thought.
    Special tokens inside messages are plain text. Raises `TextError` as `apply_chat_template` does.
    """
    written = dict(written)
    while True:
        mark = unused_marker(messages, tools) if written else ""
        text, marker = tokenizer.rendered(
            [_with_holes(m, i, mark) if i in written else m for i, m in enumerate(messages)],
            tools,
            enable_thinking=enable_thinking,
            clear_thinking=clear_thinking,
            reasoning_effort=reasoning_effort,
            escape_special=True,
        )
        pieces = re.split(f"{mark}([rc][0-9]+){mark}", text) if written else [text]
        ids, wrong = _filled(tokenizer, pieces, marker, written)
        if not wrong:
            return ids
        for number in wrong:
            del written[number]


def _with_holes(message: Mapping[str, Any], number: int, mark: str) -> dict[str, Any]:
    """The message with its parts replaced; its calls are in the hole of the content."""
    thought = message.get("reasoning_content") is not None or message.get("reasoning") is not None
    return {
        "role": "assistant",
        "reasoning_content": f"{mark}r{number}{mark}" if thought else None,
        "content": f"{mark}c{number}{mark}",
    }


def _filled(
    tokenizer: Tokenizer, pieces: list[str], marker: str, written: Mapping[int, Written]
) -> tuple[list[int], set[int]]:
    """The token identities, and the answers that could not be filled in.

    pieces: text, hole, text, hole, ..., text.
    """
    ids = tokenizer.encode_rendered(pieces[0], marker)
    wrong, missing = set(), set(written)
    thought: int | None = None  # the answer whose reasoning stands before this piece
    for hole, text in zip(pieces[1::2], pieces[2::2], strict=True):
        number = int(hole[1:])
        if hole[0] == "r":
            thought = number
            if text != THINK_END:
                wrong.add(number)
            continue
        missing.discard(number)
        part = _part(tokenizer, written[number], ids[-1] if ids else None, whole=thought == number)
        if part is None:
            wrong.add(number)
        else:
            ids += part
        thought = None
        ids += tokenizer.encode_rendered(text, marker)
    return ids, wrong | missing


def _part(tokenizer: Tokenizer, answer: Written, before: int | None, *, whole: bool) -> list[int] | None:
    """The tokens that belong into a hole behind the token `before`; None if there are none that fit."""
    ids = list(answer.token_ids)
    if ids and ids[-1] in tokenizer.eos_ids:
        ids.pop()  # the next message brings it along
    if before == answer.opening:  # both after `<think>`, or both after a thought that is closed
        return ids if whole == (before == tokenizer.token_to_id("<think>")) else None
    end = tokenizer.token_to_id(THINK_END)
    if whole or before != end or ids.count(end) != 1:
        return None
    return ids[ids.index(end) + 1 :]
