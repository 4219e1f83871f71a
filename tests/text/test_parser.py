"""The parser of assistant turns: what models really write, one case per rule, and streaming equal to whole."""

# ruff: noqa: E501 (the tables read better with one case per line)

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests_text_data import TOOLS, assistant_messages, awkward_text, splits

from glm5 import AssistantStream, parse_assistant
from glm5.errors import TextError
from glm5.text import Tokenizer

W = "<tool_call>get_weather"


def arg(key: str, value: str) -> str:
    return f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"


def parsed(
    text: str, thinking: bool = True, tools: Any = TOOLS
) -> tuple[str | None, str | None, list[tuple[str, Any]]]:
    message = parse_assistant(text, tools, thinking)
    assert message["role"] == "assistant"
    calls = message["tool_calls"]
    ids = [call["id"] for call in calls]
    assert all(ids) and len(set(ids)) == len(ids) and all(call["type"] == "function" for call in calls)
    called = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    return message["reasoning_content"], message["content"], called


CASES: dict[str, tuple[str, tuple[str | None, str | None, list[tuple[str, Any]]]]] = {
    # reasoning and content
    "reasoning and answer": ("why</think>Paris", ("why", "Paris", [])),
    "reasoning is exact": (" a\n\n</think>b", (" a\n\n", "b", [])),
    "empty reasoning": ("</think>Hi", ("", "Hi", [])),
    "cut off in the reasoning": ("so far", ("so far", None, [])),
    "nothing at all": ("", ("", None, [])),
    "blank content is None": ("r</think> \n ", ("r", None, [])),
    "blank lines around the content go": ("r</think>\n\n  code\n    x\n\n", ("r", "  code\n    x", [])),
    "an echoed <think> goes": ("<think>r</think>a", ("r", "a", [])),
    "a second </think> goes": ("r</think>a</think>b", ("r", "ab", [])),
    "a later <think> is content": ("r</think>a <think> b", ("r", "a <think> b", [])),
    "a lone < is content": ("1 < 2</think>3 <", ("1 < 2", "3 <", [])),
    # terminators
    "user at the end": ("r</think>a<|user|>", ("r", "a", [])),
    "observation at the end": ("r</think>" + W + "</tool_call><|observation|>", ("r", None, [("get_weather", {})])),
    "several terminators": ("r</think>a<|endoftext|><|user|>\n", ("r", "a", [])),
    "a terminator inside is text": ("r</think>the <|user|> tag", ("r", "the <|user|> tag", [])),
    "a terminator ends the reasoning": ("r<|endoftext|>", ("r", None, [])),
    "half a terminator is text": ("r</think>a<|us", ("r", "a<|us", [])),
    # calls
    "no arguments": ("</think><tool_call>ping</tool_call>", ("", None, [("ping", {})])),
    "a call inside the reasoning": ("hm\n" + W + arg("city", "Oslo") + "</tool_call>", ("hm\n", None, [("get_weather", {"city": "Oslo"})])),
    "content before the call": ("</think>Look:\n<tool_call>ping</tool_call>", ("", "Look:", [("ping", {})])),
    "content behind the call": ("</think>a<tool_call>ping</tool_call>\nb", ("", "a\nb", [("ping", {})])),
    "two calls": ("</think><tool_call>ping</tool_call>\n" + W + arg("days", "2") + "</tool_call>", ("", None, [("ping", {}), ("get_weather", {"days": 2})])),
    "newlines everywhere": ("</think>\n<tool_call>\nget_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>\n", ("", None, [("get_weather", {"city": "Oslo"})])),
    "newlines written as two characters": ("</think>" + W + "<arg_key>city</arg_key>\\n<arg_value>Oslo</arg_value>\\n" + arg("days", "1") + "</tool_call>", ("", None, [("get_weather", {"city": "Oslo", "days": 1})])),
    "unicode": ("想</think>好" + W + arg("city", "東京 🗼") + "</tool_call>", ("想", "好", [("get_weather", {"city": "東京 🗼"})])),
    "nested JSON": ("</think>" + W + arg("options", '{"a": {"b": [1, {"c": null}]}}') + "</tool_call>", ("", None, [("get_weather", {"options": {"a": {"b": [1, {"c": None}]}}})])),
    "a string keeps its white space": ("</think>" + W + arg("city", "\n a \"b\" \\ \n") + "</tool_call>", ("", None, [("get_weather", {"city": "\n a \"b\" \\ \n"})])),
    "an empty string": ("</think>" + W + arg("city", "") + "</tool_call>", ("", None, [("get_weather", {"city": ""})])),
    "a string that looks like a number": ("</think>" + W + arg("city", "42") + "</tool_call>", ("", None, [("get_weather", {"city": "42"})])),
    "an unknown tool is kept": ("</think><tool_call>fly" + arg("to", "Oslo") + arg("n", "2") + "</tool_call>", ("", None, [("fly", {"to": "Oslo", "n": 2})])),
    "an unknown argument is kept": ("</think>" + W + arg("mood", "[1]") + "</tool_call>", ("", None, [("get_weather", {"mood": [1]})])),
    "the first value of a key counts": ("</think>" + W + arg("city", "a") + arg("city", "b") + "</tool_call>", ("", None, [("get_weather", {"city": "a"})])),
    # missing pieces
    "no closing tag of the call": ("</think>" + W + arg("city", "Oslo"), ("", None, [("get_weather", {"city": "Oslo"})])),
    "no closing tag, next call": ("</think>" + W + arg("city", "a") + "<tool_call>ping</tool_call>", ("", None, [("get_weather", {"city": "a"}), ("ping", {})])),
    "no closing tag, no arguments": ("</think><tool_call>ping<|observation|>", ("", None, [("ping", {})])),
    "no closing tag of the value": ("</think>" + W + "<arg_key>days</arg_key><arg_value>3</tool_call>", ("", None, [("get_weather", {"days": 3})])),
    "no closing tag of the value, next call": ("</think>" + W + "<arg_key>days</arg_key><arg_value>3</tool_call><tool_call>ping</tool_call>", ("", None, [("get_weather", {"days": 3}), ("ping", {})])),
    "cut off in a string": ("</think>" + W + "<arg_key>city</arg_key><arg_value>Os", ("", None, [("get_weather", {"city": "Os"})])),
    "cut off in a number": ("</think>" + W + "<arg_key>days</arg_key><arg_value>1", ("", None, [("get_weather", {"days": 1})])),
    "cut off in a key": ("</think>" + W + arg("days", "1") + "<arg_key>ci", ("", None, [("get_weather", {"days": 1})])),
    "no closing tag of the key": ("</think>" + W + "<arg_key>days<arg_value>3</arg_value></tool_call>", ("", None, [("get_weather", {"days": 3})])),
    "a key without a value": ("</think>" + W + "<arg_key>days</arg_key></tool_call>", ("", None, [("get_weather", {})])),
    "two keys, one value": ("</think>" + W + "<arg_key>a</arg_key>" + arg("days", "3") + "</tool_call>", ("", None, [("get_weather", {"days": 3})])),
    "prose behind an unclosed call": ("</think>" + W + arg("city", "Oslo") + " I wait.", ("", None, [("get_weather", {"city": "Oslo"})])),
    "prose behind an unclosed value": ("</think>" + W + "<arg_key>days</arg_key><arg_value>3</tool_call> Done.", ("", " Done.", [("get_weather", {"days": 3})])),
    "a call without a name is content": ("</think><tool_call></tool_call>", ("", "<tool_call></tool_call>", [])),
    "the opening tag alone": ("</think>a<tool_call>", ("", "a", [])),
    # tags inside a value
    "angle brackets in a value": ("</think>" + W + arg("city", "a<b && c</d> <arg") + "</tool_call>", ("", None, [("get_weather", {"city": "a<b && c</d> <arg"})])),
    "a closing tag inside code": ("</think>" + W + arg("city", 's.find("</tool_call>"), s.find("</arg_value>")') + "</tool_call>", ("", None, [("get_weather", {"city": 's.find("</tool_call>"), s.find("</arg_value>")'})])),
    "all tags inside code": ("</think>" + W + arg("city", "<think></think><tool_call>x</tool_call>.</arg_value>.<arg_key>") + "</tool_call>", ("", None, [("get_weather", {"city": "<think></think><tool_call>x</tool_call>.</arg_value>.<arg_key>"})])),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_models_write(case: str) -> None:
    text, expected = CASES[case]
    assert parsed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", (None, "Paris", [])),
        ("", (None, None, [])),
        ("</think>Paris", (None, "Paris", [])),
        ("\n</think>Paris", (None, "Paris", [])),
        ("<think>why</think>Paris", ("why", "Paris", [])),
        ("  indented", (None, "  indented", [])),
        ("<tool_call>ping</tool_call>", (None, None, [("ping", {})])),
    ],
)
def test_without_thinking(text: str, expected: Any) -> None:
    assert parsed(text, thinking=False) == expected


def test_tools_may_be_bare_or_absent() -> None:
    text = "</think>" + W + arg("city", "42") + "</tool_call>"
    assert parsed(text, tools=[tool["function"] for tool in TOOLS])[2] == [("get_weather", {"city": "42"})]
    assert parsed(text, tools=None)[2] == [("get_weather", {"city": 42})]


def test_identities_are_repeatable_and_differ_between_seeds() -> None:
    text = "</think><tool_call>ping</tool_call><tool_call>ping</tool_call>"
    ids = {seed: [c["id"] for c in parse_assistant(text, TOOLS, seed=seed)["tool_calls"]] for seed in ("", "a")}
    assert ids == {seed: [c["id"] for c in parse_assistant(text, TOOLS, seed=seed)["tool_calls"]] for seed in ("", "a")}
    assert len({*ids[""], *ids["a"]}) == 4


def gathered(deltas: list[dict[str, Any]], thought: bool) -> dict[str, Any]:
    """What an OpenAI client makes of the deltas."""
    message: dict[str, Any] = {
        "role": "assistant",
        "reasoning_content": "" if thought else None,
        "content": None,
        "tool_calls": [],
    }
    for delta in deltas:
        assert len(delta) == 1
        for kind in ("reasoning_content", "content"):
            if kind in delta:
                assert delta[kind]
                message[kind] = (message[kind] or "") + delta[kind]
        for part in delta.get("tool_calls", []):
            calls = message["tool_calls"]
            if "id" in part:
                assert part["index"] == len(calls) and part["function"]["name"]
                calls.append(
                    {
                        "id": part["id"],
                        "type": part["type"],
                        "function": {"name": part["function"]["name"], "arguments": ""},
                    }
                )
            else:
                assert part["index"] == len(calls) - 1 and part["function"]["arguments"]
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return message


def streamed(pieces: list[str], thinking: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    stream = AssistantStream(TOOLS, thinking)
    deltas = [delta for piece in pieces for delta in stream.feed(piece)]
    deltas += stream.close()
    assert stream.close() == []
    return deltas, stream.finish()


ALL_CASES = st.sampled_from([text for text, _ in CASES.values()])


@settings(max_examples=400, deadline=None)
@given(
    st.data(), ALL_CASES | awkward_text() | st.tuples(ALL_CASES, awkward_text(), ALL_CASES).map("".join), st.booleans()
)
def test_any_split_gives_the_same(data: st.DataObject, text: str, thinking: bool) -> None:
    whole = parse_assistant(text, TOOLS, thinking)
    for pieces in (data.draw(splits(text)), list(text)):
        deltas, message = streamed(pieces, thinking)
        assert message == whole
        assert gathered(deltas, whole["reasoning_content"] is not None) == whole
    for call in whole["tool_calls"]:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


@settings(max_examples=200, deadline=None)
@given(message=assistant_messages())
@example(message={"role": "assistant", "reasoning_content": "", "content": None, "tool_calls": []})
def test_rendered_and_parsed_is_the_same_message(tokenizer: Tokenizer, message: dict[str, Any]) -> None:
    prompt = [{"role": "user", "content": "go"}]
    start = tokenizer.apply_chat_template(prompt, TOOLS, tokenize=False)
    text = tokenizer.apply_chat_template([*prompt, message], TOOLS, add_generation_prompt=False, tokenize=False)
    assert text.startswith(start)
    found = parse_assistant(text.removeprefix(start) + "<|user|>", TOOLS)
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in found["tool_calls"]]
    assert calls == [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    assert {**found, "tool_calls": []} == {**message, "tool_calls": []}
    # ... and rendering what was parsed gives the text again, to the character.
    assert text == tokenizer.apply_chat_template([*prompt, found], TOOLS, add_generation_prompt=False, tokenize=False)


def test_text_arrives_as_early_as_it_can() -> None:
    stream = AssistantStream(TOOLS)
    assert stream.feed("wh") == [{"reasoning_content": "wh"}]
    assert stream.feed("y<") == [{"reasoning_content": "y"}]
    assert stream.feed("/think>Pa") == [{"content": "Pa"}]
    assert stream.feed("ris" + W) == [{"content": "ris"}]
    head = stream.feed("<arg_key>city</arg_key>")
    assert head[0]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}
    assert stream.feed('<arg_value>O"s') == [
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "O\\"s'}}]}
    ]
    assert stream.feed("lo</arg") == [{"tool_calls": [{"index": 0, "function": {"arguments": "lo"}}]}]
    assert stream.feed("_value></tool_call>") == [{"tool_calls": [{"index": 0, "function": {"arguments": '"}'}}]}]


def test_a_long_argument_takes_linear_time() -> None:
    """A quarter of a million characters full of doubtful tags; quadratic work would take minutes."""
    text = "</think>" + W + arg("city", "x = '</arg_value>' + y\n" * 11_000) + "</tool_call>"
    whole = parse_assistant(text, TOOLS)
    stream = AssistantStream(TOOLS)
    for at in range(0, len(text), 64):
        stream.feed(text[at : at + 64])
    assert stream.finish() == whole and len(whole["tool_calls"][0]["function"]["arguments"]) > 200_000


@pytest.mark.parametrize("before", ["</think><tool_call>", "</think>" + W + "<arg_key>", "</think>Paris"])
def test_a_name_a_key_or_blank_lines_without_end_take_linear_time(before: str) -> None:
    """What waits for its end is put aside, not searched again with every piece."""
    piece = "\n " if before.endswith("Paris") else "ab <"
    stream = AssistantStream(TOOLS)
    stream.feed(before)
    for _ in range(1000):
        stream.feed(piece)
        assert len(stream._buffer) < len("</tool_call>")
    stream.feed("<arg_key>end")
    assert stream.finish() == parse_assistant(before + piece * 1000 + "<arg_key>end", TOOLS)


def test_an_ended_stream_takes_no_more() -> None:
    stream = AssistantStream()
    stream.finish()
    with pytest.raises(RuntimeError, match="has ended"):
        stream.feed("x")


@pytest.mark.parametrize("tools", [5, ["f"], [{"function": {}}], [{"function": {"name": 5}}]], ids=str)
def test_tools_without_a_name_give_a_sentence(tools: Any) -> None:
    with pytest.raises(TextError, match=r"of type int; give a list|tool 0 has no name"):
        AssistantStream(tools)


@pytest.mark.parametrize("parameters", [5, [], None, {"properties": 5}, {"properties": {"a": {"anyOf": 5}}}], ids=str)
def test_parameters_that_are_no_schema_allow_anything(parameters: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert parsed(f"<tool_call>f{arg('a', '12')}</tool_call>", False, tools) == (None, None, [("f", {"a": 12})])


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_where_no_call_may_be_made_its_tag_is_text(size):
    call = "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    text = f"maybe {call}?</think>so {call}"
    stream = AssistantStream(calls=False)
    deltas = [delta for at in range(0, len(text), size) for delta in stream.feed(text[at : at + size])]
    message = stream.finish()
    assert (message["reasoning_content"], message["content"]) == (f"maybe {call}?", f"so {call}")
    assert message["tool_calls"] == [] and not any("tool_calls" in delta for delta in deltas)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("text", ["\n2. b", "  \n\n  x", "<think>y", "a"])
def test_content_that_goes_on_is_exact(text, size):
    stream = AssistantStream(TOOLS, begun=True)
    deltas = [delta for at in range(0, len(text), size) for delta in stream.feed(text[at : at + size])]
    assert not stream.reasoning
    call = f"<tool_call>add{arg('a', '1')}</tool_call>"
    deltas += stream.feed(call)
    message = stream.finish()
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"] == text
    assert message["reasoning_content"] is None and len(message["tool_calls"]) == 1
