"""Every reply and event has the fields that the `openai` and `anthropic` packages declare, with values of their types.

The packages build their objects without a check, so a field that is missing shows only where a program reads it."""

import json
from types import NoneType

import pytest
from anthropic.types import Message, MessageTokensCount, ModelInfo, RawMessageStreamEvent
from chat_client import ADD, USER, client_of
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from pydantic import TypeAdapter
from speaker import ScriptedModel

CALL = "<tool_call>add<arg_key>a</arg_key><arg_value>12</arg_value></tool_call>"
TEXTS = ["12 and 30</think>The answer is 42.", f"use it</think>I add.{CALL}{CALL}", ""]
FLAT = {"type": "function", "strict": False, **ADD["function"]}
CHAT = {"messages": USER, "tools": [ADD], "logprobs": True, "top_logprobs": 1, "n": 2}
RESPONSES = {"input": "?", "tools": [FLAT], "include": ["message.output_text.logprobs"], "top_logprobs": 1}
MESSAGES = {"messages": USER, "max_tokens": 300, "thinking": {"type": "enabled", "budget_tokens": 1024},
            "tools": [{"name": "add", "input_schema": ADD["function"]["parameters"]}]}  # fmt: skip
EXTRA = {"weight_version", "reasoning_content", "stop_reason", "store", "max_model_len"}
"""Fields of this server, and of others of its kind, that the packages do not declare."""


def read(kind, body):
    """Checks a body of JSON: all that is required is there, and nothing has a name that is known nowhere."""
    return TypeAdapter(kind).validate_python(body)


def undeclared(found):
    """The names of fields that the packages do not know, however deep."""
    if isinstance(found, list):
        return set().union(*map(undeclared, found))
    if not hasattr(found, "model_extra"):
        return set()
    inner = [getattr(found, name) for name in type(found).model_fields]
    return set(found.model_extra or ()) | undeclared([each for each in inner if not isinstance(each, NoneType)])


def ask(text, path, fields):
    return client_of(model=ScriptedModel(text, 4096)).post(path, json={"model": "tiny", **fields})


def events(text, path, fields):
    """The JSON of all events."""
    lines = ask(text, path, {**fields, "stream": True}).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("path", "fields", "kind"),
    [
        ("/v1/chat/completions", CHAT, ChatCompletion), ("/v1/responses", RESPONSES, Response),
        ("/v1/messages", MESSAGES, Message), ("/v1/completions", {"prompt": "x", "logprobs": 1}, Completion),
    ],
)  # fmt: skip
def test_a_whole_reply(text, path, fields, kind):
    body = ask(text, path, fields).json()
    assert undeclared(read(kind, body)) <= EXTRA
    if path == "/v1/chat/completions":
        assert all(choice["message"]["refusal"] is None for choice in body["choices"])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("path", "fields", "kind"),
    [
        ("/v1/chat/completions", CHAT, ChatCompletionChunk), ("/v1/responses", RESPONSES, ResponseStreamEvent),
        ("/v1/messages", MESSAGES, RawMessageStreamEvent),
    ],
)  # fmt: skip
def test_every_event(text, path, fields, kind):
    found = [read(kind, event) for event in events(text, path, fields) if event.get("type") != "ping"]
    assert len(found) >= 3
    assert undeclared(found) <= EXTRA | {"bytes", "name"}  # of log-probabilities and of a call that is done


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_is_null_in_every_chunk_but_the_last(path):
    options = {"stream_options": {"include_usage": True}}
    fields = {"messages": USER, **options} if "chat" in path else {"prompt": "x", "max_tokens": 3, **options}
    *chunks, last = events(TEXTS[0], path, fields)
    assert chunks and all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and read(CompletionUsage, last["usage"])


def test_models_and_counts():
    client = client_of()
    for body in (client.get("/v1/models").json()["data"][0], client.get("/v1/models/tiny").json()):
        assert read(ModelInfo, body).lifecycle == "active" and read(Model, body).id == "tiny"
    counted = client.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": USER}).json()
    assert read(MessageTokensCount, counted).input_tokens > 0
    counted = client.post("/v1/responses/input_tokens", json={"model": "tiny", "input": "?"}).json()
    assert read(InputTokenCountResponse, counted).input_tokens > 0
