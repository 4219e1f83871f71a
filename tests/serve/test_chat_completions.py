"""`/v1/chat/completions` over a scripted model: the exact reply, whole and streamed."""

import json

import anyio
import pytest
import torch
from chat_client import ADD, USER, ask, client_of
from fastapi.testclient import TestClient
from speaker import ScriptedModel, speaker_model, speaker_tokenizer

from glm5.engine import Engine
from glm5.errors import GLM5Error
from glm5.serve import create_app

ARGUMENTS = "<arg_key>a</arg_key><arg_value>12</arg_value><arg_key>note</arg_key><arg_value>é</arg_value>"
CALL = f"<tool_call>add{ARGUMENTS}</tool_call>"


def events_of(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(events, index=0):
    """What an OpenAI client makes of the deltas of one sample."""
    message = {"reasoning_content": "", "content": "", "tool_calls": [], "finish_reason": None}
    for event in events:
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", []):
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                message["tool_calls"][call["index"]]["arguments"] += call["function"].get("arguments", "")
            message["finish_reason"] = choice["finish_reason"] or message["finish_reason"]
    return message


def test_reasoning_and_content_are_told_apart():
    text = "12 and 30</think>The answer is 42."
    body = ask(client_of(text)).json()
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "reasoning_content": "12 and 30",
                "content": "The answer is 42.",
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    tokenizer = speaker_tokenizer()
    prompt = tokenizer.apply_chat_template(USER)
    completion = len(tokenizer.encode(text)) + 1
    assert body["usage"] == {
        "prompt_tokens": len(prompt), "completion_tokens": completion, "total_tokens": len(prompt) + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": len(tokenizer.encode("12 and 30</think>"))},
    }  # fmt: skip


@pytest.mark.parametrize(
    "off",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
    ],
)
def test_thinking_is_turned_off_in_prompt_and_parser(off):
    body = ask(client_of("The answer is 42."), return_token_ids=True, **off).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (None, "The answer is 42.")
    assert body["prompt_token_ids"] == speaker_tokenizer().apply_chat_template(USER, enable_thinking=False)


@pytest.mark.parametrize("text", ["hm</think>The answer: é.", f"use it</think>I add.{CALL}{CALL}", f"{CALL}", ""])
@pytest.mark.parametrize("n", [1, 3])
def test_the_stream_joins_to_the_whole_reply(text, n):
    client = client_of(text)
    fields = {"tools": [ADD], "n": n, "temperature": 0}
    whole = ask(client, **fields).json()
    events = events_of(ask(client, stream=True, stream_options={"include_usage": True}, **fields))
    assert [event["object"] for event in events] == ["chat.completion.chunk"] * len(events)
    usage = events[-1]["usage"]
    assert usage.pop("prompt_tokens_details")["cached_tokens"] >= 0  # the first request filled the prefix cache
    assert usage.items() <= whole["usage"].items() and events[-1]["choices"] == []
    assert all(event["usage"] is None for event in events[:-1])  # OpenAI's say it in each
    for choice in whole["choices"]:
        message, mine = choice["message"], joined(events, choice["index"])
        assert mine["content"] == (message["content"] or "")
        assert mine["reasoning_content"] == (message["reasoning_content"] or "")
        assert mine["finish_reason"] == choice["finish_reason"]
        whole_calls = [call["function"] for call in message.get("tool_calls", [])]
        assert [{"name": c["name"], "arguments": c["arguments"]} for c in mine["tool_calls"]] == whole_calls


def test_tool_calls_are_typed_by_the_schema():
    choice = ask(client_of(f"use it</think>{CALL}"), tools=[ADD]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 12, "note": "é"}


def test_calls_have_identities_of_their_own():
    client = client_of(f"</think>{CALL}{CALL}")
    replies = [ask(client, tools=[ADD], n=2, temperature=0).json() for _ in range(2)]
    ids = [c["id"] for reply in replies for choice in reply["choices"] for c in choice["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids) == 8
    events = events_of(ask(client, tools=[ADD], stream=True))
    assert not {call["id"] for call in joined(events)["tool_calls"]} & set(ids)


@pytest.mark.parametrize("schema", [{"anyOf": 5}, {"type": {"a": 1}}, {"enum": 1}, 5])
def test_an_argument_with_a_broken_schema_may_be_anything(schema):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": schema}}}}
    (call,) = ask(client_of(f"</think>{CALL}"), tools=[tool]).json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["a"] == 12


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_gives_no_numbers_is_the_servers_fault_and_has_a_sentence(stream):
    model = speaker_model()
    with torch.no_grad():
        model.lm_head.weight[7, 0] = torch.nan
    response = ask(client_of(model=model), stream=stream)
    error = json.loads(response.text.split("data: ")[-1])["error"]
    assert error["type"] == "server_error" and "NaN or infinite logits" in error["message"]
    assert response.status_code == (200 if stream else 500)


def test_a_conversation_with_tool_results_renders_as_the_template_does():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "12 + 30?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "add", "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 12}'}}]},
        {"role": "tool", "tool_call_id": "x", "content": "42"},
    ]  # fmt: skip
    body = ask(client_of("</think>ok"), messages=messages, tools=[ADD], return_token_ids=True).json()
    plain = [{**messages[0], "role": "system"}, {"role": "user", "content": "12 + 30?"}, *messages[2:]]
    assert body["prompt_token_ids"] == speaker_tokenizer().apply_chat_template(plain, tools=[ADD])
    hidden = ask(client_of("ok"), tools=[ADD], tool_choice="none", return_token_ids=True).json()
    assert hidden["prompt_token_ids"] == speaker_tokenizer().apply_chat_template(USER)


def test_a_special_token_in_a_message_is_text():
    messages = [{"role": "user", "content": "<|assistant|><think>"}]
    ids = ask(client_of("ok"), messages=messages, return_token_ids=True).json()["prompt_token_ids"]
    assert ids.count(speaker_tokenizer().token_to_id("<|assistant|>")) == 1


def test_logprobs_and_token_ids_cover_every_token():
    client = client_of(model=speaker_model())
    fields = {
        "logprobs": True,
        "top_logprobs": 3,
        "return_token_ids": True,
        "seed": -5,
        "max_tokens": 9,
        "ignore_eos": True,
    }
    whole = ask(client, **fields).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert len(content) == len(whole["token_ids"]) == 9 and whole["finish_reason"] == "length"
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3 for entry in content)
    spelled = b"".join(bytes(entry["bytes"]) for entry in content)
    assert spelled.decode(errors="replace") == speaker_tokenizer().decode(whole["token_ids"])
    events = events_of(ask(client, stream=True, **fields))
    choices = [choice for event in events for choice in event["choices"]]
    assert [i for choice in choices for i in choice.get("token_ids", [])] == whole["token_ids"]
    assert [e for choice in choices if choice["logprobs"] for e in choice["logprobs"]["content"]] == content


def test_limits_of_length_and_stop():
    client = client_of("</think>one two three")
    cut = ask(client, max_tokens=3).json()
    assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 3
    assert ask(client, max_completion_tokens=4, max_tokens=9).json()["usage"]["completion_tokens"] == 4
    stopped = ask(client, stop=[" three"]).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("one two", "stop")


class Recorded:
    def __init__(self):
        self.begun, self.seen = [], []
        self.begin, self.ended = self.begun.append, self.seen.append

    def written(self, session_id, messages):
        return {}


def test_a_recorder_sees_what_was_sampled():
    recorder = Recorded()
    client = client_of("</think>ok", recorder=recorder)
    ids = ask(client, return_token_ids=True).json()["choices"][0]["token_ids"]
    events_of(ask(client, stream=True))
    assert [[token.token_id for token in g.samples[0].tokens] for g in recorder.seen] == [ids, ids]
    assert [[m["content"] for m in g.messages] for g in recorder.seen] == [["What is 12 + 30?"]] * 2
    assert recorder.begun == [None, None]
    assert ask(client, messages=[]).status_code == 400 and len(recorder.seen) == 2


def test_models_and_health():
    client = client_of()
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 512)
    assert client.get("/health").json() == {
        "status": "ready",
        "model": "tiny",
        "weight_version": 0,
        "running": 0,
        "waiting": 0,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_of_a_client_that_went_away_stops(stream):
    model = ScriptedModel("</think>" + "word " * 80)
    model.delay = 0.01
    app = create_app(Engine(model, speaker_tokenizer()), model_name="tiny")
    body = json.dumps({"model": "tiny", "messages": USER, "stream": stream}).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/chat/completions", "raw_path": b"",
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("x", 1), "client": ("y", 2),
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    said = iter([{"type": "http.request", "body": body, "more_body": False}])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))

    async def receive():
        message = next(said, None)
        while message is None and len(calls) < 10:
            await anyio.sleep(0.001)
        return message or {"type": "http.disconnect"}

    async def send(_):
        pass

    anyio.run(app, scope, receive, send)
    assert 0 < len(calls) < 300 < len(model.script)
    assert TestClient(app).get("/health").json()["running"] == 0


def test_a_server_needs_a_tokenizer():
    with pytest.raises(GLM5Error, match=r"tokenizer\.json"):
        create_app(Engine(ScriptedModel("ok")))


OVER = {
    "/v1/chat/completions": ({"messages": USER, "stop": ["1", "42"]}, lambda body: (
        body["choices"][0]["message"]["reasoning_content"], body["choices"][0]["message"]["content"],
        body["choices"][0]["finish_reason"])),
    "/v1/responses": ({"input": "?", "stop": ["1", "42"]}, lambda body: (
        body["output"][0]["content"][0]["text"], body["output"][1]["content"][0]["text"],
        "stop" if body["status"] == "completed" else body["status"])),
    "/v1/messages": ({"messages": USER, "max_tokens": 200, "stop_sequences": ["1", "42"],
                      "thinking": {"type": "enabled", "budget_tokens": 1024}}, lambda body: (
        body["content"][0]["thinking"], body["content"][1]["text"],
        "stop" if body["stop_sequence"] == "42" else body["stop_reason"])),
}  # fmt: skip


@pytest.mark.parametrize("path", OVER)
def test_a_stop_string_ends_the_answer_and_not_the_reasoning(path):
    fields, read = OVER[path]
    for text in ("12 is 1</think>The answer is 42, not 1.", "12 is 1, yes</think>The answer is 42."):
        reasoning = text.partition("</think>")[0]
        answer = client_of(text).post(path, json={"model": "tiny", **fields})
        assert answer.status_code == 200, answer.text
        assert read(answer.json()) == (reasoning, "The answer is", "stop")


def test_a_stop_at_the_end_of_the_reasoning_and_one_behind_a_call():
    client = client_of("12</think>The answer is 12.")
    message = ask(client, stop=["</think>"]).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("12", None)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert ask(client_of("12 and 13"), stop=[" and"], **off).json()["choices"][0]["message"]["content"] == "12"
    client = client_of(f"12{CALL}")  # a call ends the reasoning too
    message = ask(client, stop=["12", "</tool_call>"], tools=[ADD]).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "12" and message["tool_calls"][0]["function"]["name"] == "add"
