"""`/v1/responses` as the Codex client speaks it: its body, its tools of all kinds, and its next turn."""

import json

import pytest
from chat_client import client_of, prompts_of
from speaker import ScriptedModel
from test_responses import openai_over

PATCH = "*** Begin Patch\n*** End Patch"
SHELL = {
    "type": "function", "name": "shell", "description": "Runs a command.", "strict": False,
    "parameters": {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}},
                   "required": ["command"], "additionalProperties": False},
}  # fmt: skip
APPLY = {
    "type": "custom", "name": "apply_patch", "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: begin_patch hunk+ end_patch"},
}  # fmt: skip
ISSUES = {
    "type": "namespace", "name": "mcp__issues", "description": "Issues.",
    "tools": [{"type": "function", "name": "find", "parameters": {"type": "object", "properties": {}}}],
}  # fmt: skip
BODY = {
    "model": "tiny", "instructions": "You are a coding agent.", "stream": True, "store": False, "tool_choice": "auto",
    "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
    "include": ["reasoning.encrypted_content"], "prompt_cache_key": "0199", "service_tier": "auto",
    "text": {"verbosity": "medium"}, "client_metadata": {"x-codex-installation-id": "1"},
    "tools": [SHELL, APPLY, ISSUES, {"type": "web_search", "external_web_access": False}],
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: read only."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
    ],
}  # fmt: skip
CALLS = {
    "shell": ('<arg_key>command</arg_key><arg_value>["ls"]</arg_value>',
              ("function_call", "arguments", '{"command": ["ls"]}')),
    "apply_patch": (f"<arg_key>input</arg_key><arg_value>{PATCH}</arg_value>", ("custom_tool_call", "input", PATCH)),
    "mcp__issues.find": ("", ("function_call", "arguments", "{}")),
}  # fmt: skip


def roomy(text):
    return client_of(model=ScriptedModel(text, positions=4096))


def streamed(client, **changes):
    response = client.post("/v1/responses", json={**BODY, **changes})
    assert response.status_code == 200, response.text
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("name", list(CALLS))
def test_a_turn_of_codex_and_the_next_one(name):
    arguments, (kind, field, value) = CALLS[name]
    client = roomy(f"a plan</think><tool_call>{name}{arguments}</tool_call>")
    events = streamed(client)
    final = events[-1]["response"]
    assert events[-1]["type"] == "response.completed" and final["ignored_tools"] == ["web_search"]
    assert [tool["type"] for tool in final["tools"]] == ["function", "custom", "namespace"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]
    reasoning, call = done
    assert (call["type"], call[field]) == (kind, value)
    assert (call["name"], call.get("namespace")) == (name.split(".")[-1], "mcp__issues" if "." in name else None)
    deltas = [event for event in events if event["type"].endswith(".delta") and event["item_id"] == call["id"]]
    assert "".join(event["delta"] for event in deltas) == value
    # Codex keeps no text of a reasoning, only what is sealed in it.
    kept = {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]}
    result = {"type": f"{kind}_output", "call_id": call["call_id"], "output": "done"}
    prompts = prompts_of(client)
    streamed(client, input=[*BODY["input"], kept, call, result])
    (prompt,) = prompts
    shown = {"shell": '["ls"]', "apply_patch": PATCH}.get(name, "")
    assert f"<think>a plan</think><tool_call>{name}" in prompt and shown in prompt
    assert prompt.endswith("<|observation|><tool_response>done</tool_response><|assistant|><think>")
    assert "begin_patch hunk+" in prompt and "web_search" not in prompt


def test_the_package_reads_a_custom_call():
    arguments = f"<arg_key>input</arg_key><arg_value>{PATCH}</arg_value>"
    client = openai_over(roomy(f"</think><tool_call>apply_patch{arguments}</tool_call>"))
    with client.responses.stream(model="tiny", input="Fix it.", tools=[APPLY]) as stream:
        kinds = [event.type for event in stream]
        (call,) = [item for item in stream.get_final_response().output if item.type == "custom_tool_call"]
    assert call.input == PATCH and "response.custom_tool_call_input.done" in kinds


def test_a_sealed_reasoning_that_was_changed_is_refused():
    changed = {"type": "reasoning", "summary": [], "encrypted_content": "glm5:%"}
    response = roomy("ok").post("/v1/responses", json={**BODY, "input": [*BODY["input"], changed]})
    assert response.status_code == 400 and "send it as it came" in response.text
    foreign = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}
    assert streamed(roomy("ok"), input=[*BODY["input"], foreign])
