"""How Anthropic's messages become the chat template's."""

import pytest
from speaker import speaker_tokenizer

from glm5.errors import TextError
from glm5.serve.anthropic_prompt import chat_messages
from glm5.serve.anthropic_schema import CountTokensRequest


def translated(*messages, **fields):
    return chat_messages(CountTokensRequest(model="m", messages=list(messages), **fields))


def user(*content):
    return {
        "role": "user",
        "content": list(content) if len(content) != 1 or isinstance(content[0], dict) else content[0],
    }


def text(words):
    return {"type": "text", "text": words}


def call(name, **arguments):
    return {"type": "tool_use", "id": f"id-{name}", "name": name, "input": arguments}


def result(name, content="done", **fields):
    return {"type": "tool_result", "tool_use_id": f"id-{name}", "content": content, **fields}


def assistant(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def test_system_texts_are_joined_without_the_billing_line():
    messages, _ = translated(user("Hi"), system=[text("x-anthropic-billing-header: cch=1;"), text("A."), text("B.")])
    assert messages == [{"role": "system", "content": "A.\nB."}, {"role": "user", "content": "Hi"}]
    assert translated(user("Hi"), system="A.")[0][0] == {"role": "system", "content": "A."}
    assert translated(user("Hi"), {"role": "system", "content": "Late."}, user("Ho"))[0][1]["role"] == "system"


def test_turns_of_one_role_in_a_row_are_one():
    messages, _ = translated(
        user("a"), user(text("b"), text("c")), assistant(text("d")), assistant(text("e")), user("f")
    )
    assert [(m["role"], m["content"]) for m in messages] == [("user", "a\nb\nc"), ("assistant", "de"), ("user", "f")]


def test_results_follow_the_order_of_the_calls_and_come_before_what_is_said():
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    messages, _ = translated(
        user("go"),
        assistant(thought, text("ok"), call("one", a=1), call("two"), {"type": "redacted_thinking", "data": "x"}),
        user(text("and now?"), result("two", [text("2"), text("3")]), result("one", is_error=True)),
    )
    assert messages[1]["reasoning_content"] == "hm" and messages[1]["content"] == "ok"
    assert [c["function"] for c in messages[1]["tool_calls"]] == [
        {"name": "one", "arguments": {"a": 1}}, {"name": "two", "arguments": {}},
    ]  # fmt: skip
    assert messages[2:] == [
        {"role": "tool", "tool_call_id": "id-one", "content": "Error: done"},
        {"role": "tool", "tool_call_id": "id-two", "content": "2\n3"},
        {"role": "user", "content": "and now?"},
    ]  # fmt: skip


def test_an_error_that_says_so_is_left_as_it_is():
    messages, _ = translated(user("go"), assistant(call("f")), user(result("f", "ValueError: no", is_error=True)))
    assert messages[-1]["content"] == "ValueError: no"


def test_the_last_turn_of_the_assistant_begins_the_answer():
    messages, prefill = translated(user("Hi"), assistant(text("The answer"), text(" is")))
    assert (len(messages), prefill) == (1, "The answer is")
    for last, fields in ((assistant(text("x")), {"thinking": {"type": "enabled", "budget_tokens": 2000}}),
                         (assistant(call("f")), {})):  # fmt: skip
        with pytest.raises(TextError, match="end with a message of the user"):
            translated(user("Hi"), last, **fields)
    with pytest.raises(TextError, match="white space"):
        translated(user("Hi"), assistant(text("x ")))


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([user(result("f"))], "answers no call"),
        ([user("go"), assistant(call("f")), user(result("g"))], "'id-g' answers no call"),
        ([user("go"), assistant(call("f")), user("no"), user(result("f"))], None),
        ([user({"type": "image", "source": {}})], r"messages.0 holds an image.*describe it in words"),
        ([user("go"), assistant(call("f")), user(result("f", [{"type": "image"}]))], "tool_result holds an image"),
        ([user({"type": "document", "source": {}})], "block of type 'document'"),
        ([user({"type": "text"})], "needs 'text', a string"),
        ([user("go"), assistant({"type": "tool_use", "id": "", "name": "f", "input": {}}), user("x")], "needs 'id'"),
        ([user("go"), assistant({"type": "tool_use", "id": "a", "name": "f", "input": "{}"}), user("x")], "an object"),
        ([{"role": "system", "content": "x"}], "nothing to answer"),
    ],
)
def test_conversations_that_make_no_sense_are_refused(messages, sentence):
    if sentence is None:
        assert translated(*messages)
        return
    with pytest.raises(TextError, match=sentence):
        translated(*messages)


LATE = {"name": "late", "description": "Comes late", "input_schema": {"type": "object"}, "defer_loading": True}
FOUND = [{"type": "tool_reference", "tool_name": "late"}]


def test_a_deferred_tool_is_shown_where_a_result_refers_to_it():
    tools = [{"name": "search", "input_schema": {"type": "object"}}, LATE]
    said = [user("go"), assistant(call("search")), user(result("search", FOUND))]
    request = CountTokensRequest(model="m", messages=said, tools=tools)
    messages, _ = chat_messages(request)
    ids = speaker_tokenizer().apply_chat_template(messages, tools=request.visible_tools)
    prompt = speaker_tokenizer().decode(ids)
    assert prompt.count('"late"') == 1 and '<tool_response><tools>\n{"name": "late"' in prompt
    assert "defer_loading" not in prompt


@pytest.mark.parametrize(
    ("content", "sentence"),
    [([*FOUND, text("x")], "alone or none"), ([{"type": "tool_reference"}], "needs 'tool_name'"),
     ([{**FOUND[0], "tool_name": "never"}], "names the tool 'never'")],
)  # fmt: skip
def test_wrong_references_are_refused(content, sentence):
    with pytest.raises(TextError, match=sentence):
        translated(user("go"), assistant(call("f")), user(result("f", content)), tools=[LATE])
