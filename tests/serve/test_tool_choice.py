"""Which calls an answer may make: none where the prompt shows no tool, and those that `tool_choice` names."""

import json

import pytest
from chat_client import ADD, USER, client_of
from speaker import speaker_tokenizer

CALL = "<tool_call>add<arg_key>a</arg_key><arg_value>12</arg_value></tool_call>"
FLAT = {"type": "function", **ADD["function"]}
MESSAGES = {"name": "add", "input_schema": {"type": "object"}}


def post(client, path, **fields):
    return client.post(f"/v1/{path}", json={"model": "tiny", **fields})


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"messages": USER}),
        ("chat/completions", {"messages": USER, "tools": [ADD], "tool_choice": "none"}),
        ("responses", {"input": "12?"}),
        ("responses", {"input": "12?", "tools": [FLAT], "tool_choice": "none"}),
        ("messages", {"messages": USER, "max_tokens": 90, "thinking": {"type": "enabled"}}),
        ("messages", {"messages": USER, "max_tokens": 90, "thinking": {"type": "enabled"}, "tools": [MESSAGES],
                      "tool_choice": {"type": "none"}}),
    ],
)  # fmt: skip
def test_without_a_visible_tool_nothing_is_called(path, fields, spelled):
    """Neither by the special token, which is never sampled, nor by its spelling, which is text."""
    tokenizer = speaker_tokenizer()
    script = f"hm</think>I call {CALL}."
    client = client_of(script)
    if spelled:
        engine = client.app.state.service.source
        engine.model.script[:] = [*tokenizer.encode("hm</think>I call "), *tokenizer.encode(CALL, allow_special=False),
                                  tokenizer.token_to_id("<|user|>")]  # fmt: skip
    text = post(client, path, max_output_tokens=90, **fields) if path == "responses" else post(client, path, **fields)
    assert text.status_code == 200, text.text
    said = json.dumps(text.json())
    assert "tool_use" not in said and "function_call" not in said and '"tool_calls"' not in said
    assert ("<tool_call>add" in said) is spelled and "I call" in said


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_results_are_matched_to_their_calls_by_id(path):
    """The template shows no ids, so a prompt with the results the other way round must be the same one."""

    def prompt(*names):
        if path == "responses":
            made = [
                {"type": "function_call", "call_id": i, "name": "add", "arguments": f'{{"note": "{i}"}}'} for i in "ab"
            ]
            results = [{"type": "function_call_output", "call_id": i, "output": f"of {i}"} for i in names]
            fields = {"input": [*USER, *made, *results], "tools": [FLAT]}
        else:
            made = [
                {"id": i, "type": "function", "function": {"name": "add", "arguments": f'{{"note": "{i}"}}'}}
                for i in "ab"
            ]
            results = [{"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in names]
            fields = {"messages": [*USER, {"role": "assistant", "tool_calls": made}, *results], "tools": [ADD]}
        asked = []
        client = client_of("</think>ok")
        source = client.app.state.service.source
        stream = source.stream
        source.stream = lambda ids, *rest, **more: asked.append(ids) or stream(ids, *rest, **more)
        answer = post(client, path, **fields)
        return asked[0] if answer.status_code == 200 else answer.json()["error"]["message"]

    assert prompt("b", "a") == prompt("a", "b") and "of a" in speaker_tokenizer().decode(prompt("a", "b"))
    assert "the tool result for 'c' answers no call" in prompt("a", "c")
