"""`/v1/chat/completions` over a scripted model: the exact reply, whole and streamed, and every kind of refusal."""

import json

import anyio
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from speaker import ScriptedModel, speaker_model, speaker_tokenizer

from glm5.engine import Engine
from glm5.errors import GLM5Error
from glm5.serve import Limits, create_app
from glm5.serve.schema import ChatRequest

USER = [{"role": "user", "content": "What is 12 + 30?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "note": {"type": "string"}}},
    },
}
ARGUMENTS = "<arg_key>a</arg_key><arg_value>12</arg_value><arg_key>note</arg_key><arg_value>é</arg_value>"
CALL = f"<tool_call>add{ARGUMENTS}</tool_call>"


def client_of(text="", *, limits=None, recorder=None, model=None):
    engine = Engine(model or ScriptedModel(text), speaker_tokenizer())
    app = create_app(engine, model_name="tiny", limits=limits, recorder=recorder)
    return TestClient(app, raise_server_exceptions=False)


def ask(client, **fields):
    body = json.dumps({"model": "tiny", "messages": USER, **fields})
    return client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})


NAMES = ["role", "content", "type", "text", "function", "name", "arguments", "parameters", "tool_calls"]
FUZZED = client_of("</think>ok")


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
            "message": {"role": "assistant", "reasoning_content": "12 and 30", "content": "The answer is 42."},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    tokenizer = speaker_tokenizer()
    prompt = tokenizer.apply_chat_template(USER)
    completion = len(tokenizer.encode(text)) + 1
    assert body["usage"] == {
        "prompt_tokens": len(prompt), "completion_tokens": completion, "total_tokens": len(prompt) + completion,
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
    assert events[-1]["usage"] == whole["usage"] and events[-1]["choices"] == []
    assert all("usage" not in event for event in events[:-1])
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


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 5_000, 100_000])
def test_no_depth_of_a_tool_breaks_the_server(depth):
    parameters = '{"a": ' * depth + "1" + "}" * depth
    tools = [{"type": "function", "function": {"name": "add", "parameters": "HERE"}}]
    body = json.dumps({"model": "tiny", "max_tokens": 2, "messages": USER, "tools": tools}).replace(
        '"HERE"', parameters
    )
    response = FUZZED.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400), response.text


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


def test_a_recorder_sees_what_was_sampled():
    seen = []
    client = client_of("</think>ok", recorder=seen.append)
    ids = ask(client, return_token_ids=True).json()["choices"][0]["token_ids"]
    events_of(ask(client, stream=True))
    assert [[token.token_id for token in completion.tokens[0]] for completion in seen] == [ids, ids]


def test_models_and_health():
    client = client_of()
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 512)
    assert client.get("/health").json() == {"status": "ok", "model": "tiny", "weight_version": 0, "running": 0}


@pytest.mark.parametrize(
    ("fields", "status", "sentence"),
    [
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": ["hi"]}, 400, "messages.0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "content of message 0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "text only",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            400,
            "not JSON",
        ),
        ({"model": "gpt-9"}, 404, "'gpt-9' is not served here; ask for 'tiny'"),
        ({"temprature": 1}, 400, "Unknown field 'temprature'. Did you mean 'temperature'?"),
        ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p is 0"),
        ({"top_k": -3}, 400, "top_k is -3"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10_000}, 400, "the context limit is 512 tokens"),
        ({"n": 0}, 400, "n: "),
        ({"n": 17}, 400, "n = 16"),
        ({"stop": [""]}, 400, "stop holds ''"),
        ({"min_tokens": 2, "stop_token_ids": [1000000]}, 400, "stop_token_ids holds 1000000"),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"tools": [{"type": "web"}]}, 400, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, 400, "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "add", "parameters": 5}}]},
            400,
            "tools.0.function.parameters",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 5}, *USER]}, 400, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": [5]}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, 'needs a "text" that is a string'),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, 400, "that is a string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half of a surrogate pair"),
        ({"tool_choice": "required", "tools": [ADD]}, 400, "a forced call is not supported"),
        ({"chat_template_kwargs": {"enable_thinkin": False}}, 400, "chat_template_kwargs.enable_thinkin"),
        ({"stream": True, "max_tokens": 10_000}, 400, "the context limit is 512 tokens"),
    ],
)
def test_bad_requests_get_a_sentence_in_openais_shape(fields, status, sentence):
    client = client_of("ok")
    response = ask(client, **fields)
    error = response.json()["error"]
    assert response.status_code == status
    assert sentence in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert client.get("/health").json()["running"] == 0


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([name for name in ChatRequest.model_fields if name != "model"]), anything, max_size=3
    )
)
def test_no_value_of_any_field_breaks_the_server(fields):
    body = json.dumps({"model": "tiny", "messages": USER, "max_tokens": 2, **fields})
    response = FUZZED.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400), (fields, response.text)
    assert FUZZED.get("/health").json()["running"] == 0


def test_neutral_values_of_what_is_not_built_are_accepted():
    fields = {"presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "user": "x", "store": False,
              "temperature": None, "metadata": {"a": "b"}}  # fmt: skip
    assert ask(client_of("</think>ok"), **fields).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [("POST", "/v1/chat/completions", b"{", 400), ("POST", "/v1/chat/completions", b"[1]", 400),
     ("POST", "/v1/chat/completions", b"\xff\xfe", 400), ("POST", "/v1/chat/completions", b"", 400),
     ("GET", "/v1/chat/completions", None, 405), ("POST", "/v1/embeddings", b"{}", 404),
     ("GET", "/nothing", None, 404)],
)  # fmt: skip
def test_bad_bodies_and_paths(method, path, body, status):
    response = client_of().request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_large_body_is_refused_whether_or_not_its_length_is_stated():
    client = client_of("ok", limits=Limits(max_body_bytes=1000))
    long = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
    assert client.post("/v1/chat/completions", content=long).status_code == 413
    unstated = client.post("/v1/chat/completions", content=(part for part in (long[:900], long[900:])))
    assert unstated.status_code == 413 and unstated.json()["error"]["type"] == "request_too_large"


def test_one_request_too_many_is_refused_and_a_failure_gives_its_place_back():
    assert ask(client_of("ok", limits=Limits(max_concurrent=0))).status_code == 429
    model = ScriptedModel("ok")
    client = client_of(model=model, limits=Limits(max_concurrent=1))
    model.script = [10**6]  # beyond the vocabulary: the forward pass fails
    for _ in range(3):
        response = ask(client)
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "IndexError" not in response.text
    failed = ask(client, stream=True)
    assert failed.status_code == 200 and '"server_error"' in failed.text and "[DONE]" not in failed.text
    assert client.get("/health").json()["running"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_of_a_client_that_went_away_stops(stream):
    model = ScriptedModel("</think>" + "word " * 80)
    model.delay = 0.002
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
    assert 0 < len(calls) < 60 < len(model.script)
    assert TestClient(app).get("/health").json()["running"] == 0


def test_a_server_needs_a_tokenizer():
    with pytest.raises(GLM5Error, match=r"tokenizer\.json"):
        create_app(Engine(ScriptedModel("ok")))
