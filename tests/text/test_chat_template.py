"""The chat template: one golden text per rule of the published format, and `transformers` renders the same."""

# ruff: noqa: E501 (the tables read better with one case per line)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests_text_data import TOOLS, assistant_messages, awkward_text
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glm5.errors import TextError
from glm5.text import SPECIAL_TOKENS, Tokenizer

USER = {"role": "user", "content": "Hi"}
TOOLS_HEAD = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_FOOT = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)
PING = {"type": "function", "function": {"name": "ping", "description": "Says pong <é>", "strict": True}}
LATE = {"type": "function", "function": {"name": "late", "defer_loading": True, "parameters": {"type": "object"}}}


def said(content: str | None, reasoning: str | None = None, *calls: tuple[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(calls)
        ]
    return message


# name -> messages, options, text behind [gMASK]<sop>; add_generation_prompt is False unless it is among the options
GOLDEN: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "user": ([USER], {}, "<|user|>Hi"),
    "system first": ([{"role": "system", "content": "Be brief."}, USER], {}, "<|system|>Be brief.<|user|>Hi"),
    "user text is not stripped": ([{"role": "user", "content": " a\n"}], {}, "<|user|> a\n"),
    "text parts are joined": ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], {}, "<|user|>ab"),
    "generation prompt": ([USER], {"add_generation_prompt": True}, "<|user|>Hi<|assistant|><think>"),
    "generation prompt without thinking": (
        [USER], {"add_generation_prompt": True, "enable_thinking": False}, "<|user|>Hi<|assistant|></think>"),
    "answer without reasoning": ([USER, said(" Yes.\n")], {}, "<|user|>Hi<|assistant|></think>Yes."),
    "answer with reasoning, which is not stripped": (
        [USER, said("Yes.", " why\n")], {}, "<|user|>Hi<|assistant|><think> why\n</think>Yes."),
    "empty reasoning is reasoning": ([USER, said("Yes.", "")], {}, "<|user|>Hi<|assistant|><think></think>Yes."),
    "reasoning inside the content": (
        [USER, said("<think>why</think>\nYes.")], {}, "<|user|>Hi<|assistant|><think>why</think>Yes."),
    "reasoning inside the content without its opening tag": (
        [USER, said("why</think>Yes.")], {}, "<|user|>Hi<|assistant|><think>why</think>Yes."),
    "past reasoning is cleared": (
        [USER, said("A", "r1"), USER, said("B", "r2")], {},
        "<|user|>Hi<|assistant|></think>A<|user|>Hi<|assistant|><think>r2</think>B"),
    "past reasoning is kept on request": (
        [USER, said("A", "r1"), USER, said("B", "r2")], {"clear_thinking": False},
        "<|user|>Hi<|assistant|><think>r1</think>A<|user|>Hi<|assistant|><think>r2</think>B"),
    "reasoning stays between tool calls of one turn": (
        [USER, said("", "r1", ("ping", {})), {"role": "tool", "content": "pong"}, said("B", "r2")],
        {"clear_thinking": True},
        "<|user|>Hi<|assistant|><think>r1</think><tool_call>ping</tool_call><|observation|><tool_response>pong"
        "</tool_response><|assistant|><think>r2</think>B"),
    "arguments: strings raw, others JSON": (
        [USER, said("Go", None, ("f", {"s": 'a "b" <c>', "n": 1.5, "o": {"k": ["é", None, True]}}))], {},
        "<|user|>Hi<|assistant|></think>Go<tool_call>f<arg_key>s</arg_key><arg_value>a \"b\" <c></arg_value>"
        "<arg_key>n</arg_key><arg_value>1.5</arg_value><arg_key>o</arg_key><arg_value>"
        '{"k": ["é", null, true]}</arg_value></tool_call>'),
    "several calls stand together": (
        [USER, said(None, None, ("f", {}), ("items", {"items": 1}))], {},
        "<|user|>Hi<|assistant|></think><tool_call>f</tool_call><tool_call>items<arg_key>items</arg_key>"
        "<arg_value>1</arg_value></tool_call>"),
    "a bare call": (
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}], {},
        "<|user|>Hi<|assistant|></think><tool_call>f</tool_call>"),
    "one observation for a run of results": (
        [USER, said("", None, ("f", {}), ("f", {})), {"role": "tool", "content": "1"},
         {"role": "tool", "content": [{"type": "text", "text": "2"}]}, said("", None, ("f", {})),
         {"role": "tool", "content": "3"}], {},
        "<|user|>Hi<|assistant|></think><tool_call>f</tool_call><tool_call>f</tool_call><|observation|><tool_response>1"
        "</tool_response><tool_response>2</tool_response><|assistant|></think><tool_call>f</tool_call><|observation|>"
        "<tool_response>3</tool_response>"),
    "tools, one per line": (
        [{"role": "system", "content": "S"}, USER], {"tools": [PING, {"name": "bare", "parameters": {"type": "object"}}]},
        TOOLS_HEAD + '{"name": "ping", "description": "Says pong <é>"}\n{"name": "bare", "parameters": {"type": "object"}}\n'
        + TOOLS_FOOT + "<|system|>S<|user|>Hi"),
    "no tools, no block": ([USER], {"tools": []}, "<|user|>Hi"),
    "deferred tools appear when referred to": (
        [USER, said("", None, ("ping", {})),
         {"role": "tool", "content": [{"type": "tool_reference", "name": "late"}]}], {"tools": [PING, LATE]},
        TOOLS_HEAD + '{"name": "ping", "description": "Says pong <é>"}\n' + TOOLS_FOOT
        + "<|user|>Hi<|assistant|></think><tool_call>ping</tool_call><|observation|><tool_response><tools>\n"
        '{"name": "late", "parameters": {"type": "object"}}\n</tools></tool_response>'),
    "effort: the form of 5.2": (
        [USER, said("A"), USER], {"reasoning_effort": "high", "add_generation_prompt": True},
        "<|system|>Reasoning Effort: High<|user|>Hi<|assistant|><think></think>A<|user|>Hi<|assistant|><think>"),
    "effort stands before the tools": (
        [USER], {"reasoning_effort": "max", "tools": [{"name": "f"}]},
        "<|system|>Reasoning Effort: Max" + TOOLS_HEAD + '{"name": "f"}\n' + TOOLS_FOOT + "<|user|>Hi"),
    "effort without thinking": (
        [USER], {"reasoning_effort": "low", "enable_thinking": False, "add_generation_prompt": True},
        "<|user|>Hi<|assistant|><think></think>"),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(saved: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(saved)


@pytest.mark.parametrize("rule", GOLDEN)
def test_rules(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, rule: str) -> None:
    messages, options, expected = GOLDEN[rule]
    options = {"add_generation_prompt": False, **options}
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == "[gMASK]<sop>" + expected
    assert theirs.apply_chat_template(messages, tokenize=False, **options) == "[gMASK]<sop>" + expected
    ids = theirs.apply_chat_template(messages, return_dict=False, **options)
    assert tokenizer.apply_chat_template(messages, **options) == ids == tokenizer.encode("[gMASK]<sop>" + expected)


OTHERS = st.sampled_from(["user", "system", "tool"]).flatmap(
    lambda role: st.fixed_dictionaries({"role": st.just(role), "content": awkward_text()})
)
CONVERSATIONS = st.lists(OTHERS | assistant_messages(), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(messages=CONVERSATIONS, data=st.data())
def test_transformers_renders_alike(
    tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, messages: list[dict[str, Any]], data: st.DataObject
) -> None:
    options: dict[str, Any] = {"tools": data.draw(st.sampled_from([None, TOOLS])), "tokenize": False}
    options |= {
        name: data.draw(st.booleans()) for name in ("add_generation_prompt", "enable_thinking", "clear_thinking")
    }
    assert tokenizer.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, **options)


def test_what_clients_send_is_made_plain(tokenizer: Tokenizer) -> None:
    """JSON strings as arguments, the newer name of the reasoning, no content: the same text as the plain form."""
    call = {"id": "c0", "type": "function"}
    sent = {
        "role": "assistant",
        "reasoning": "r",
        "tool_calls": [call | {"function": {"name": "f", "arguments": '{"a": [1]}'}}, call | {"function": {"name": "g", "arguments": ""}}],
    }  # fmt: skip
    plain = said("", "r", ("f", {"a": [1]}), ("g", {}))
    assert tokenizer.apply_chat_template([USER, sent]) == tokenizer.apply_chat_template([USER, plain])
    assert sent["tool_calls"][0]["function"]["arguments"] == '{"a": [1]}', "the caller's message was changed"


BAD: dict[str, tuple[Any, str]] = {
    "no messages": ([], "a list of at least one message"),
    "one message, not a list": (USER, "a list of at least one message"),
    "a string": ("Hi", "a list of at least one message"),
    "a message that is text": (["Hi"], "message 0 is a str"),
    "an unknown role": ([USER, {"role": "asistant", "content": ""}], "message 1 has the role 'asistant'.*Did you mean 'assistant'"),
    "no role": ([{"content": "x"}], "message 0 has the role None"),
    "no content": ([{"role": "user"}], r"the content of message 0 \(user\) is a NoneType"),
    "a dict as a tool result": ([{"role": "tool", "content": {"a": 1}}], r"message 0 \(tool\) is a dict.*json.dumps"),
    "an image": ([{"role": "user", "content": [{"type": "image_url"}]}], "part of type 'image_url'; GLM-5 reads text only"),
    "arguments that are not JSON": ([said("", None, ("f", "{a"))], "message 0 calls 'f' with arguments that are not JSON"),
    "arguments that are a list": ([said("", None, ("f", "[1]"))], "arguments that are not a JSON object"),
    "a number": (5, "a list of at least one message"),
    "a part that is a number": ([{"role": "user", "content": [5]}], r"message 0 \(user\) has the part 5"),
    "a part without its text": ([{"role": "user", "content": [{"type": "text"}]}], r"message 0 \(user\) has the part"),
    "a part whose text is a number": ([{"role": "tool", "content": [{"type": "text", "text": 5}]}], r"message 0 \(tool\) has the part"),
    "a part whose type is a list": ([{"role": "user", "content": [{"type": ["text"]}]}], r"part of type \['text'\]"),
    "calls that are a number": ([{"role": "assistant", "tool_calls": 5}], "the tool_calls of message 0 are of type int"),
    "a call that is a number": ([{"role": "assistant", "tool_calls": [5]}], "a tool call of message 0 has no function name"),
    "arguments nested too deeply": ([said("", None, ("f", '{"a": ' + "[" * 100_000))], "message 0 calls 'f' with arguments that are not JSON"),
    "arguments with an endless number": ([said("", None, ("f", '{"a": ' + "9" * 5_000 + "}"))], "message 0 calls 'f' with arguments that are not JSON"),
    "a call without a name": ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "a tool call of message 0 has no function name"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_messages_give_a_sentence(tokenizer: Tokenizer, case: str) -> None:
    messages, sentence = BAD[case]
    with pytest.raises(TextError, match=sentence):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tools": [{"type": "function"}]}, "tool 0 has no name"),
        ({"tools": ["f"]}, "tool 0 has no name"),
        ({"tools": 5}, "the tools are of type int"),
        ({"reasoning_effort": "huge"}, "use 'low', 'high' or 'max'"),
        ({"escape_special": True, "tokenize": False}, "escape_special needs tokenize=True"),
    ],
)
def test_bad_options_give_a_sentence(tokenizer: Tokenizer, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TextError, match=sentence):
        tokenizer.apply_chat_template([USER], **options)


@pytest.mark.parametrize("escape_special", [False, True])
def test_a_tool_nested_too_deeply_gives_a_sentence(tokenizer: Tokenizer, escape_special: bool) -> None:
    schema: Any = {}
    for _ in range(5_000):
        schema = {"a": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(TextError, match=r"nested too deeply|RecursionError"):
        tokenizer.apply_chat_template([USER], [tool], escape_special=escape_special)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% if %}", "cannot render"),
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{{ messages[0].content + 1 }}", "failed on this conversation: TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_bad_template_gives_a_sentence(tokenizer: Tokenizer, template: str, sentence: str) -> None:
    with pytest.raises(TextError, match=sentence):
        Tokenizer(tokenizer.backend, template).apply_chat_template([USER])


def test_templates_of_other_directories_render(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ extra }}"
    )
    text = Tokenizer(tokenizer.backend, template).apply_chat_template(
        [{"role": "user", "content": "<é>"}, USER], tokenize=False, variables={"extra": "!"}
    )
    assert text == '{"role": "user", "content": "<é>"}!'


# --- escape_special: untrusted text cannot speak for another role


@settings(max_examples=150, deadline=None)
@given(messages=CONVERSATIONS, name=awkward_text(), description=awkward_text())
def test_escaped_text_adds_no_special_token(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], name: str, description: str
) -> None:
    tools = [{"name": name, "parameters": {"properties": {name: {"description": description}}}}]
    ids = tokenizer.apply_chat_template(messages, tools, escape_special=True)
    harmless = [{**m, "content": "x"} if m["role"] != "assistant" else m for m in messages]
    expected = tokenizer.apply_chat_template(harmless, [{"name": "x"}])
    control = set(tokenizer.special_ids.values())
    assert [i for i in ids if i in control] == [i for i in expected if i in control]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tools, tokenize=False)


@given(messages=CONVERSATIONS)
def test_harmless_text_is_not_changed_by_escaping(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> None:
    harmless = [{**m, "content": "naïve  東京 < 3"} if m["role"] != "assistant" else m for m in messages]
    assume(not any(token in repr(harmless) for token in SPECIAL_TOKENS))
    assert tokenizer.apply_chat_template(harmless, TOOLS, escape_special=True) == tokenizer.apply_chat_template(
        harmless, TOOLS
    )


def test_escaping_keeps_the_reasoning_inside_a_content(tokenizer: Tokenizer) -> None:
    messages = [USER, said("<think>why</think>Yes <|user|>")]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, escape_special=True)
    assert tokenizer.decode(ids) == "[gMASK]<sop><|user|>Hi<|assistant|><think>why</think>Yes <|user|>"
    assert [ids.count(tokenizer.token_to_id(t)) for t in ("<think>", "</think>", "<|user|>")] == [1, 1, 1]


def test_a_text_with_the_marker_itself_survives(tokenizer: Tokenizer) -> None:
    text = "a\ufdd0<|user|>\ufdd1<\ufdd2|user|>"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=False, escape_special=True
    )
    assert tokenizer.decode(ids) == "[gMASK]<sop><|user|>" + text and ids.count(7) == 1
    everything = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(TextError, match="noncharacters"):
        tokenizer.apply_chat_template([{"role": "user", "content": everything}], escape_special=True)


def test_the_template_is_in_the_package() -> None:
    import glm5.text

    patterns = (Path(glm5.text.__file__).parents[2] / "pyproject.toml").read_text()
    assert '"**/*.jinja"' in patterns
