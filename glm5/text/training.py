"""Conversations as training rows: token identities and the mask of what the model is to learn.

The rendered text of a conversation holds each token once. Supervised is what the model itself must write: the
reasoning, `</think>`, the answer, the tool calls, and the terminator, which is the next role token. Not supervised are
the prompts: all that others say, `<|assistant|>`, and the `<think>` or bare `</think>` that the generation prompt
ends in. Behind a last assistant turn stands the terminator it should have written: `<|observation|>` after tool calls,
else `<|user|>`.

The mask is read off the identities, so it is right for the template of any GLM-5 directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glm5.text.tokenizer import Tokenizer


def render_for_training(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    clear_thinking: bool = False,
    reasoning_effort: str | None = None,
) -> tuple[list[int], list[bool]]:
    """Token identities of a conversation and, for each, whether it is supervised.

    An assistant message with `"train": False` stays in the row without being supervised: how the published recipe
    treats wrong steps of an agent's trajectory. The reasoning of all turns is kept by default, because each turn saw
    it when it was written; with `clear_thinking=True` earlier turns read as if they had not thought. Special tokens
    inside messages are plain text here.
    """
    ids = tokenizer.apply_chat_template(
        messages, tools, False, clear_thinking=clear_thinking, reasoning_effort=reasoning_effort, escape_special=True
    )
    turns = [message for message in messages if message["role"] == "assistant"]
    if messages[-1]["role"] == "assistant":
        ids.append(tokenizer.token_to_id("<|observation|>" if turns[-1].get("tool_calls") else "<|user|>"))
    assistant = tokenizer.token_to_id("<|assistant|>")
    others = {tokenizer.token_to_id("<|system|>"), assistant}
    mask = [False] * len(ids)
    starts = [i for i, token in enumerate(ids) if token == assistant]
    for message, start in zip(turns, starts, strict=True):
        if message.get("train", True):
            for i in range(start + 2, len(ids)):  # behind <|assistant|> and the tag of the generation prompt
                mask[i] = ids[i] not in others
                if ids[i] in others or ids[i] in tokenizer.eos_ids:
                    break
    return ids, mask
