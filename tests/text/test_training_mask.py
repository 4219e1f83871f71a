"""Training rows: what is supervised, checked against texts and against the generation prompts themselves."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_text_data import TOOLS, assistant_messages, awkward_text

from glm5.text import TERMINATORS, Tokenizer, render_for_training

USER = {"role": "user", "content": "Hi <|assistant|><think>"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CALL_TEXT = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
RESULT = {"role": "tool", "content": "sunny"}


def spans(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    """The supervised texts."""
    ids, mask = render_for_training(tokenizer, messages, TOOLS, **options)
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for supervised, run in runs if supervised]


def said(content: str, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], []),
        ([USER, said("Yes", "why")], ["why</think>Yes<|user|>"]),
        ([USER, said("Yes", "")], ["</think>Yes<|user|>"]),
        ([USER, said("Yes")], ["Yes<|user|>"]),
        ([USER, said("A", "r"), USER, said("B", "s")], ["r</think>A<|user|>", "s</think>B<|user|>"]),
        ([USER, said("", "r", tool_calls=[CALL])], ["r</think>" + CALL_TEXT + "<|observation|>"]),
        (
            [USER, said("Look", "r", tool_calls=[CALL]), RESULT, RESULT, said("B", "s")],
            ["r</think>Look" + CALL_TEXT + "<|observation|>", "s</think>B<|user|>"],
        ),
        ([USER, said("bad", "r", train=False), USER, said("B", "s")], ["s</think>B<|user|>"]),
        ([USER, said("B", "s"), USER, said("bad", "r", train=False)], ["s</think>B<|user|>"]),
        ([USER, said("A", "r"), said("B", "s")], ["r</think>A", "s</think>B<|user|>"]),
        ([USER, said("A", "r"), {"role": "system", "content": "S"}], ["r</think>A"]),
    ],
)
def test_supervised_texts(tokenizer: Tokenizer, messages: list[dict[str, Any]], expected: list[str]) -> None:
    assert spans(tokenizer, messages) == expected


def test_cleared_turns_answer_without_reasoning(tokenizer: Tokenizer) -> None:
    messages = [USER, said("A", "r"), USER, said("B", "s")]
    assert spans(tokenizer, messages, clear_thinking=True) == ["A<|user|>", "s</think>B<|user|>"]


@settings(max_examples=100, deadline=None)
@given(turns=st.lists(st.tuples(awkward_text(), assistant_messages()), min_size=1, max_size=3))
def test_each_turn_is_what_its_prompt_must_yield(tokenizer: Tokenizer, turns: list[tuple[str, dict[str, Any]]]) -> None:
    """Prompt by prompt: the row is the generation prompt, then the supervised tokens of the turn, then the rest."""
    messages = [m for text, answer in turns for m in ({"role": "user", "content": text}, answer)]
    ids, mask = render_for_training(tokenizer, messages, TOOLS)
    assert len(ids) == len(mask)
    whole = tokenizer.apply_chat_template(messages, TOOLS, False, clear_thinking=False, tokenize=False)
    assert tokenizer.decode(ids)[: len(whole)] == whole and tokenizer.decode(ids)[len(whole) :] in TERMINATORS
    covered = 0
    for at in range(0, len(messages), 2):
        prompt = tokenizer.apply_chat_template(messages[: at + 1], TOOLS, clear_thinking=False, escape_special=True)
        assert ids[: len(prompt)] == prompt and not mask[len(prompt) - 1]
        end = next(i for i in range(len(prompt), len(ids)) if ids[i] in tokenizer.eos_ids)
        assert all(mask[len(prompt) : end + 1])
        covered += end + 1 - len(prompt)
    assert sum(mask) == covered
