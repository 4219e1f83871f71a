"""Conversations as training documents: the chat template's tokens, and which of them the model is to learn.

The model learns what it writes itself: reasoning, answer, tool calls and the token that ends the turn. An assistant
message with `"train": False` stays in the row and is not learned: how a trajectory keeps its wrong steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm5.data.shards import TokenDocument
from glm5.text import Tokenizer, render_for_training

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chat:
    """One conversation in OpenAI's form, the tools that it may call, and the skill that it teaches."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    skill: str = ""


def chat_documents(conversations: Iterable[Conversation | Chat], tokenizer: Tokenizer) -> Iterator[TokenDocument]:
    """One document per conversation, masked; write them with `write_dataset` and load them with `keep_whole`."""
    for conversation in conversations:
        chat = conversation if isinstance(conversation, Chat) else Chat(tuple(conversation))
        ids, learn = render_for_training(tokenizer, chat.messages, chat.tools)
        learned = [token for token, wanted in zip(ids, learn, strict=True) if wanted]
        yield TokenDocument(ids, len(tokenizer.decode(learned, skip_special_tokens=True).encode()), learn)
