"""A turn of the assistant that the answer goes on from: vLLM's `continue_final_message`.

The prompt ends behind the words of that turn, as if the model had written them itself: with its reasoning where it has
one, without any where it has none. What the model adds is content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm5.errors import InputError
from glm5.text import Tokenizer
from glm5.text.messages import prepare_messages


@dataclass(frozen=True)
class Unfinished:
    """The beginning of an answer."""

    content: str
    reasoning: str | None

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Unfinished:
        """From the last message. Raises `InputError` for one that cannot be gone on from."""
        (turn,) = prepare_messages([message])
        if turn["role"] != "assistant" or turn["tool_calls"]:
            raise InputError(
                "continue_final_message goes on from a last message of the assistant without tool calls; send one."
            )
        content, reasoning = turn["content"], turn.get("reasoning_content")
        if content != content.rstrip():
            raise InputError("The message that the answer goes on from ends in white space; remove it.")
        return cls(content, reasoning if isinstance(reasoning, str) else None)

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens behind the prompt; it ends in `<think>` where there is a reasoning."""
        ids = [] if self.reasoning is None else tokenizer.encode(self.reasoning, allow_special=False)
        if self.reasoning is not None:
            ids.append(tokenizer.token_to_id("</think>"))
        return ids + tokenizer.encode(self.content, allow_special=False)
