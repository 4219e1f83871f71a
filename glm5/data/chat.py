"""Conversations as training documents: the chat template's tokens, and which of them the model is to learn.

The model learns what it writes itself: reasoning, answer, tool calls and the token that ends the turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from glm5.data.shards import TokenDocument
from glm5.text import Tokenizer, render_for_training

Conversation = Sequence[Mapping[str, Any]]


def chat_documents(conversations: Iterable[Conversation], tokenizer: Tokenizer) -> Iterator[TokenDocument]:
    """One document per conversation, masked; write them with `write_dataset` and load them with `keep_whole`."""
    for messages in conversations:
        ids, learn = render_for_training(tokenizer, messages)
        learned = [token for token, wanted in zip(ids, learn, strict=True) if wanted]
        yield TokenDocument(ids, len(tokenizer.decode(learned, skip_special_tokens=True).encode()), learn)
