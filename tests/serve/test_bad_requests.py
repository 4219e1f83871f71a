"""What `/v1/chat/completions` refuses, each with a sentence; no value of any field breaks it."""

import json

import pytest
from chat_client import ADD, USER, ask, client_of
from hypothesis import given, settings
from hypothesis import strategies as st
from speaker import ScriptedModel

from glm5.serve import Limits
from glm5.serve.schema import ChatRequest

NAMES = ["role", "content", "type", "text", "function", "name", "arguments", "parameters", "tool_calls"]
FUZZED = client_of("</think>ok")


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
        ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p is 0"),
        ({"top_k": -3}, 400, "top_k is -3"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10_000}, 400, "the context limit is 512 tokens"),
        ({"n": 0}, 400, "n: "),
        ({"n": 17}, 400, "At most 16 choices"),
        ({"stop": [""]}, 400, "stop holds ''"),
        ({"min_tokens": 2, "stop_token_ids": [1000000]}, 400, "stop_token_ids holds 1000000"),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias has the key 'x'"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias of token 5 is 101"),
        ({"presence_penalty": 3}, 400, "presence_penalty is 3"),
        ({"prompt_logprobs": 1, "stream": True}, 400, "leave out stream"),
        ({"audio": {"voice": "x"}}, 400, "audio is not supported"),
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
        ({"tool_choice": "required"}, 400, "tool_choice forces a tool, and there are none"),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}, "tools": [ADD]}, 400, "the tool 'sub'"),
        ({"tool_choice": "always", "tools": [ADD]}, 400, "tool_choice"),
        ({"response_format": {"type": "xml"}}, 400, "The response format 'xml' is not known"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 400, "needs its schema"),
        ({"structured_outputs": {"grammar": "start: /a/"}}, 400, "turn thinking off"),
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
    fields = {"presence_penalty": 0, "logit_bias": {}, "audio": None, "user": "x", "store": False,
              "temperature": None, "metadata": {"a": "b"}}  # fmt: skip
    assert ask(client_of("</think>ok"), **fields).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [("POST", "/v1/chat/completions", b"{", 400), ("POST", "/v1/chat/completions", b"[1]", 400),
     ("POST", "/v1/chat/completions", b"\xff\xfe", 400), ("POST", "/v1/chat/completions", b"", 400),
     ("GET", "/v1/chat/completions", None, 405), ("POST", "/v1/embeddings", b"{}", 501),
     ("GET", "/nothing", None, 404)],
)  # fmt: skip
def test_bad_bodies_and_paths(method, path, body, status):
    response = client_of().request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [(b'"\xff"', "not valid UTF-8 (byte 11)"), (b"[" * 200_000, "nested too deep"),
     (b"9" * 5000, "a whole number of more than 4300 digits"), (b"]", "not valid JSON")],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/inference/v1/generate"])
def test_a_body_that_cannot_be_read_is_told_why(path, value, sentence):
    body = b'{"model": ' + value + b"}"
    response = FUZZED.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and sentence in response.json()["error"]["message"]


def test_a_large_body_is_refused_whether_or_not_its_length_is_stated():
    client = client_of("ok", limits=Limits(max_body_bytes=1000))
    long = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
    assert client.post("/v1/chat/completions", content=long).status_code == 413
    unstated = client.post("/v1/chat/completions", content=(part for part in (long[:900], long[900:])))
    assert unstated.status_code == 413 and unstated.json()["error"]["type"] == "request_too_large"


def test_one_request_too_many_is_refused_and_a_failure_gives_its_place_back():
    assert ask(client_of("ok", limits=Limits(max_concurrent=0, max_waiting=0))).status_code == 429
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


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 5_000, 100_000])
def test_no_depth_of_a_tool_breaks_the_server(depth):
    parameters = '{"a": ' * depth + "1" + "}" * depth
    tools = [{"type": "function", "function": {"name": "add", "parameters": "HERE"}}]
    body = json.dumps({"model": "tiny", "max_tokens": 2, "messages": USER, "tools": tools}).replace(
        '"HERE"', parameters
    )
    response = FUZZED.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_without_the_header_for_json_is_told_so(path, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    reply = client_of("ok").post(path, content=json.dumps({"model": "tiny", "messages": []}), headers=headers)
    assert reply.status_code == 400 and "Content-Type: application/json" in reply.json()["error"]["message"]
