"""Which calls an answer may make: none where the prompt shows no tool, and those that `tool_choice` names."""

import json

import pytest
from chat_client import ADD, USER, client_of, prompts_of
from speaker import ScriptedModel, speaker_model, speaker_tokenizer

CALL = "<tool_call>add<arg_key>a</arg_key><arg_value>12</arg_value></tool_call>"
FLAT = {"type": "function", **ADD["function"]}
SUB = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object", "properties": {}}}}
MESSAGES = {"name": "add", "input_schema": {"type": "object"}}
THINKING = {"max_tokens": 90, "thinking": {"type": "enabled"}}


def post(client, path, **fields):
    return client.post(f"/v1/{path}", json={"model": "tiny", **fields})


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"messages": USER}),
        ("chat/completions", {"messages": USER, "tools": [ADD], "tool_choice": "none"}),
        ("responses", {"input": "12?", "max_output_tokens": 90}),
        ("responses", {"input": "12?", "tools": [FLAT], "tool_choice": "none"}),
        ("messages", {"messages": USER, **THINKING}),
        ("messages", {"messages": USER, **THINKING, "tools": [MESSAGES], "tool_choice": {"type": "none"}}),
    ],
)
def test_without_a_visible_tool_nothing_is_called(path, fields, spelled):
    """Neither by the special token, which is never sampled, nor by its spelling, which is text."""
    tokenizer, model = speaker_tokenizer(), ScriptedModel(f"hm</think>I call {CALL}.")
    if spelled:
        words = [*tokenizer.encode("hm</think>I call "), *tokenizer.encode(CALL, allow_special=False)]
        model.script = [*words, tokenizer.token_to_id("<|user|>")]
    answer = post(client_of(model=model), path, **fields)
    assert answer.status_code == 200, answer.text
    said = json.dumps(answer.json())
    assert "tool_use" not in said and "function_call" not in said and '"tool_calls"' not in said
    assert ("<tool_call>add" in said) is spelled and "I call" in said


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_results_are_matched_to_their_calls_by_id(path):
    """The template shows no ids, so a prompt with the results the other way round must be the same one."""

    def prompt(*names):
        functions = [{"name": "add", "arguments": f'{{"note": "{name}"}}'} for name in "ab"]
        if path == "responses":
            made = [{"type": "function_call", "call_id": i, **f} for i, f in zip("ab", functions, strict=True)]
            results = [{"type": "function_call_output", "call_id": i, "output": f"of {i}"} for i in names]
            fields = {"input": [*USER, *made, *results], "tools": [FLAT]}
        else:
            made = [{"id": i, "type": "function", "function": f} for i, f in zip("ab", functions, strict=True)]
            results = [{"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in names]
            fields = {"messages": [*USER, {"role": "assistant", "tool_calls": made}, *results], "tools": [ADD]}
        client = client_of("</think>ok")
        prompts = prompts_of(client)
        answer = post(client, path, **fields)
        return prompts[0] if answer.status_code == 200 else answer.json()["error"]["message"]

    assert prompt("b", "a") == prompt("a", "b") and "of a" in prompt("a", "b")
    assert "the tool result for 'c' answers no call" in prompt("a", "c")


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_allowed_tools_alone_are_shown_and_called(path, mode):
    """`auto` lets the model say something else, `required` makes it call one of them, whatever it wants."""
    says = ScriptedModel("</think>I call nothing.", positions=4096)
    client = client_of(model=says if mode == "auto" else speaker_model(positions=4096))
    prompts = prompts_of(client)
    effort = "none" if mode == "required" else "low"
    if path == "responses":
        choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "add"}]}
        fields = {"input": "?", "tools": [FLAT, {"type": "function", **SUB["function"]}], "max_output_tokens": 300,
                  "reasoning": {"effort": effort}, "seed": 1}  # fmt: skip
    else:
        named = {"type": "function", "function": {"name": "add"}}
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}}
        fields = {"messages": USER, "tools": [ADD, SUB], "max_tokens": 300, "seed": 1, "reasoning_effort": effort}
    answer = post(client, path, tool_choice=choice, **fields)
    assert answer.status_code == 200, answer.text
    assert '"add"' in prompts[0] and '"sub"' not in prompts[0]
    said = json.dumps(answer.json().get("output", answer.json().get("choices")))
    assert ('"add"' in said) is (mode == "required") and ("I call nothing." in said) is (mode == "auto")


ADDING = [{"type": "function", "name": "add"}]
WRONG = [
    ("always", "must be"), ({"type": "function"}, "must be"), (5, "must be"), ({}, "must be"),
    ({"type": "allowed_tools", "mode": "auto", "tools": []}, "must be"),
    ({"type": "allowed_tools", "mode": "never", "tools": ADDING}, "must be"),
    ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp", "server_label": "x"}]}, "must be"),
    ({"type": "allowed_tools", "mode": "auto", "tools": [{**ADDING[0], "name": "mul"}]}, "allows the tool 'mul'"),
    ({"type": "mcp", "server_label": "x"}, "a tool of type 'mcp' is not run by this server"),
]  # fmt: skip


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
@pytest.mark.parametrize(("choice", "sentence"), WRONG)
def test_a_wrong_choice_gets_a_sentence(path, choice, sentence):
    fields = {"input": "?", "tools": [FLAT]} if path == "responses" else {"messages": USER, "tools": [ADD]}
    answer = post(client_of("ok"), path, tool_choice=choice, **fields)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and sentence in message and "tool_choice" in message


class Recorder:
    """Keeps the generations."""

    def __init__(self):
        self.ended_ones = []
        self.ended = self.ended_ones.append

    def begin(self, session_id):
        pass


def test_what_is_recorded_is_the_models_own_choice():
    """A ban would make the recorded probabilities those of another distribution; so there the tag is text."""
    recorder = Recorder()
    answer = post(client_of(f"hm</think>I call {CALL}", recorder=recorder), "chat/completions", messages=USER).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == f"I call {CALL}" and "tool_calls" not in message
    (generation,) = recorder.ended_ones
    assert generation.params.bad_sequences == ()


def test_the_tag_that_is_text_has_its_logprobs():
    client = client_of(f"hm</think>I call {CALL} now", recorder=Recorder())
    answer = post(client, "responses", input="12?", include=["message.output_text.logprobs"]).json()
    (part,) = answer["output"][1]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"] == f"I call {CALL} now"
