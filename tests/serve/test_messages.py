"""`/v1/messages` with the real `anthropic` package: whole and streamed, tools, thinking, refusals, counts."""

import dataclasses
import json

import anthropic
import pytest
from chat_client import client_of
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from speaker import ScriptedModel, speaker_model, speaker_tokenizer

from glm5.engine import Engine
from glm5.serve import create_app
from glm5.serve.anthropic_schema import MessagesRequest
from glm5.serve.messages import Asked

USER = [{"role": "user", "content": "What is 12 + 30?"}]
ADD = {
    "name": "add",
    "description": "Adds",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "note": {"type": "string"}}},
}
SAY = {
    "name": "say",
    "input_schema": {
        "type": "object",
        "properties": {"word": {"enum": ["yes", "no"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["word", "n"],
        "additionalProperties": False,
    },
}
ARGUMENTS = "<arg_key>a</arg_key><arg_value>12</arg_value><arg_key>note</arg_key><arg_value>é</arg_value>"
CALL = f"<tool_call>add{ARGUMENTS}</tool_call>"
ROOM = 1024
"""Positions: the prompt of a tool is 500 tokens of this vocabulary."""
THINK = {"type": "enabled", "budget_tokens": 1024}


def sdk_of(text="", *, model=None):
    """The package's client over the app, without a network."""
    if model is None:
        model = ScriptedModel(text)
        model.config = dataclasses.replace(model.config, max_position_embeddings=ROOM)
    app = create_app(Engine(model, speaker_tokenizer()), model_name="tiny")
    http = TestClient(app, raise_server_exceptions=False)
    return anthropic.Anthropic(api_key="none", base_url="http://testserver", http_client=http, max_retries=0)


def ask(sdk, **fields):
    return sdk.messages.create(**{"model": "tiny", "messages": USER, "max_tokens": 200, **fields})


def streamed(sdk, **fields):
    """The events as they came, and the message that the package puts together from them."""
    with sdk.messages.stream(**{"model": "tiny", "messages": USER, "max_tokens": 200, **fields}) as stream:
        events = [event for event in stream if event.type not in ("text", "thinking", "input_json", "signature")]
        return events, stream.get_final_message()


def parts(message):
    return [block.model_dump(exclude_none=True, exclude={"id", "signature"}) for block in message.content]


THOUGHT = {"type": "thinking", "thinking": "12 and 30"}
ANSWER = {"type": "text", "text": "The answer is 42."}
USED = {"type": "tool_use", "name": "add", "input": {"a": 12, "note": "é"}}


@pytest.mark.parametrize(
    ("text", "fields", "blocks", "reason"),
    [
        ("12 and 30</think>The answer is 42.", {"thinking": THINK}, [THOUGHT, ANSWER], "end_turn"),
        ("The answer is 42.", {}, [ANSWER], "end_turn"),
        (f"12 and 30</think>The answer is 42.{CALL}", {"thinking": {"type": "adaptive"}, "tools": [ADD]},
         [THOUGHT, ANSWER, USED], "tool_use"),
        (f"{CALL}{CALL}", {"tools": [ADD]}, [USED, USED], "tool_use"),
        ("<tool_call>f</tool_call>", {"tools": [ADD]}, [{"type": "tool_use", "name": "f", "input": {}}], "tool_use"),
        ("", {}, [], "end_turn"),
    ],
)  # fmt: skip
def test_whole_and_streamed_messages_are_the_same(text, fields, blocks, reason):
    sdk = sdk_of(text)
    whole = ask(sdk, **fields)
    assert (whole.type, whole.role, whole.model, whole.stop_reason) == ("message", "assistant", "tiny", reason)
    assert parts(whole) == blocks
    events, final = streamed(sdk, **fields)
    assert parts(final) == blocks and final.stop_reason == reason
    assert final.usage.output_tokens == whole.usage.output_tokens == len(speaker_tokenizer().encode(text)) + 1
    thoughts = [block.signature for block in (*whole.content, *final.content) if block.type == "thinking"]
    assert len(set(thoughts)) == (1 if thoughts else 0) and all(thoughts)
    ids = [block.id for block in (*whole.content, *final.content) if block.type == "tool_use"]
    assert len(set(ids)) == len(ids) and all(name.startswith("toolu_") for name in ids)
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(blocks)
    starts = [e.content_block.model_dump(exclude_none=True) for e in events if e.type == "content_block_start"]
    assert all(not (start.get("text") or start.get("thinking") or start.get("input")) for start in starts)


def test_what_goes_on_keeps_its_blank_lines():
    begun = {"messages": [*USER, {"role": "assistant", "content": "1. a"}]}
    assert ask(sdk_of("\n2. b"), **begun).content[0].text == "\n2. b"
    _, message = streamed(sdk_of("\n2. b"), **begun)
    assert message.content[0].text == "\n2. b"


def test_usage_counts_the_cache_apart():
    sdk = sdk_of("The answer is 42.")
    messages = [{"role": "user", "content": "What is 12 + 30? " * 20}]
    count = sdk.messages.count_tokens(model="tiny", messages=messages).input_tokens
    first, again = (ask(sdk, messages=messages).usage for _ in range(2))
    assert (first.input_tokens, first.cache_read_input_tokens) == (count, 0)
    assert again.input_tokens + again.cache_read_input_tokens == count and again.cache_read_input_tokens >= 64
    _, final = streamed(sdk, messages=messages)
    assert (final.usage.input_tokens, final.usage.cache_read_input_tokens) == (
        again.input_tokens, again.cache_read_input_tokens,
    )  # fmt: skip


def test_stop_sequences_and_lengths():
    sdk = sdk_of("one two three")
    stopped = ask(sdk, stop_sequences=["x", " three"])
    assert (parts(stopped)[0]["text"], stopped.stop_reason, stopped.stop_sequence) == (
        "one two", "stop_sequence", " three",
    )  # fmt: skip
    assert streamed(sdk, stop_sequences=[" three"])[1].stop_sequence == " three"
    cut = ask(sdk, max_tokens=3)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 3
    long = ask(sdk_of("word " * 400), max_tokens=ROOM)
    assert long.stop_reason == "model_context_window_exceeded"
    assert long.usage.input_tokens + long.usage.output_tokens == ROOM


# ---- tools -------------------------------------------------------------------------------------------------------
def test_at_most_one_call_without_parallel_use():
    sdk = sdk_of(f"Well.{CALL}{CALL}")
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = ask(sdk, tools=[ADD], tool_choice=choice)
    assert parts(message) == [{"type": "text", "text": "Well."}, USED] and message.stop_reason == "tool_use"
    assert parts(streamed(sdk, tools=[ADD], tool_choice=choice)[1]) == parts(message)


@pytest.mark.parametrize("thinking", [THINK, {"type": "disabled"}])
@pytest.mark.parametrize(
    "choice",
    [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "say"},
     {"type": "tool", "name": "say", "disable_parallel_tool_use": True}],
)  # fmt: skip
def test_an_untrained_model_makes_a_valid_forced_call(choice, thinking):
    sdk = sdk_of(model=speaker_model(positions=ROOM))
    message = ask(sdk, tools=[SAY], tool_choice=choice, thinking=thinking, max_tokens=300)
    assert message.stop_reason == "tool_use"
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert call.name == "say" and call.input["word"] in ("yes", "no") and 0 <= call.input["n"] <= 9


def test_a_json_answer_is_held_to_its_schema():
    sdk = sdk_of(model=speaker_model(positions=ROOM))
    form = {"type": "json_schema", "schema": SAY["input_schema"]}
    message = ask(sdk, output_config={"format": form}, max_tokens=300)
    (text,) = [block.text for block in message.content if block.type == "text"]
    assert set(json.loads(text)) == {"word", "n"}


def test_tools_are_hidden_when_none_may_be_called():
    sdk = sdk_of("ok")
    plain = sdk.messages.count_tokens(model="tiny", messages=USER).input_tokens
    hidden = sdk.messages.count_tokens(model="tiny", messages=USER, tools=[ADD], tool_choice={"type": "none"})
    shown = sdk.messages.count_tokens(model="tiny", messages=USER, tools=[ADD])
    assert hidden.input_tokens == plain < shown.input_tokens


def test_what_was_answered_comes_back_as_the_same_tokens():
    """A second turn begins with the first one's prompt and answer, so its prefix is cached."""
    text = f"12 and 30</think>I add.{CALL}"
    sdk = sdk_of(text)
    first = ask(sdk, thinking=THINK, tools=[ADD])
    (call,) = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "42"}]}
    messages = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    tokenizer = speaker_tokenizer()
    body = {"messages": messages, "thinking": THINK, "tools": [ADD], "model": "tiny", "max_tokens": 5}
    body = json.loads(json.dumps(body, default=lambda block: block.model_dump(exclude_none=True)))
    service = create_app(Engine(ScriptedModel(""), tokenizer)).state.service
    second = Asked(MessagesRequest(**body), service, None).prompt
    opening = Asked(MessagesRequest(**{**body, "messages": USER}), service, None).prompt
    assert second[: len(opening)] == opening
    answer = second[len(opening) :]
    said = tokenizer.encode(text)
    assert answer[: len(said)] == said
    assert tokenizer.decode(answer[len(said) :]) == (
        "<|observation|><tool_response>42</tool_response><|assistant|><think>"
    )


# ---- refusals ----------------------------------------------------------------------------------------------------
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}


@pytest.mark.parametrize(
    ("fields", "kind", "sentence"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, anthropic.BadRequestError, "holds an image"),
        ({"model": "claude-9"}, anthropic.NotFoundError, "ask for 'tiny'"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web"}]}, anthropic.BadRequestError, "Anthropic's service"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [ADD]}, anthropic.BadRequestError, "no tool 'x'"),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "needs tools"),
        ({"messages": [{"role": "user", "content": "word " * 1200}]}, anthropic.BadRequestError, "prompt is too long"),
        ({"extra_body": {"temprature": 1}}, anthropic.BadRequestError, "Did you mean 'temperature'"),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, anthropic.BadRequestError, "mcp_servers is not supported"),
        ({"stop_sequences": [""]}, anthropic.BadRequestError, "stop holds ''"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_anthropics_errors(fields, kind, sentence, stream):
    with pytest.raises(kind) as refused:
        ask(sdk_of("ok"), stream=stream, **fields)
    body = refused.value.body
    assert body["type"] == "error" and sentence in body["error"]["message"]
    assert body["request_id"] == refused.value.request_id
    assert body["error"]["type"] == ("not_found_error" if kind is anthropic.NotFoundError else "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_passes_is_an_error(stream):
    model = ScriptedModel("word " * 80)
    model.delay = 0.02
    sdk, ask_for = sdk_of(model=model), {"extra_headers": {"X-Request-Timeout": "0.1"}}
    with pytest.raises(anthropic.APIStatusError, match="deadline passed"):
        streamed(sdk, **ask_for) if stream else ask(sdk, **ask_for)


def test_a_failure_in_a_stream_is_an_error_event():
    model = ScriptedModel("ok")
    model.script = [10**6]  # beyond the vocabulary: the forward pass fails
    with pytest.raises(anthropic.APIStatusError, match="api_error"):
        list(ask(sdk_of(model=model), stream=True))


# ---- anything at all ---------------------------------------------------------------------------------------------
NAMES = ["role", "content", "type", "text", "name", "input", "id", "tool_use_id", "thinking", "source", "input_schema",
         "user", "assistant", "tool_result", "tool_use", "any", "tool"]  # fmt: skip
FUZZED = client_of("ok")
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
block = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image", "redacted_thinking"])},
    optional=dict.fromkeys(("text", "thinking", "id", "name", "input", "tool_use_id", "content"), anything),
)
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]),
        "content": st.text(max_size=5) | st.lists(block, max_size=3),
    }
)


def post(path, body):
    reply = FUZZED.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code in (200, 400), (body, reply.text)
    assert reply.status_code == 200 or reply.json()["error"]["type"] == "invalid_request_error"


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.sampled_from([n for n in MessagesRequest.model_fields if n != "model"]), anything, max_size=3)
)
def test_no_value_of_any_field_breaks_the_server(fields):
    post("/v1/messages", {"model": "tiny", "messages": USER, "max_tokens": 2, **fields})


@settings(max_examples=50, deadline=None)
@given(st.lists(message, max_size=4), st.booleans())
def test_no_conversation_breaks_the_server(messages, stream):
    post("/v1/messages", {"model": "tiny", "messages": messages, "max_tokens": 2, "stream": stream})
    post("/v1/messages/count_tokens", {"model": "tiny", "messages": messages})


class TurnsModel(ScriptedModel):
    """Calls `add`, and answers when its result is there."""

    def forward(self, ids_1T, *, attention):
        tokenizer, ids = speaker_tokenizer(), ids_1T[0].tolist()
        text = "It is 42." if tokenizer.token_to_id("<tool_response>") in ids else CALL
        self.script = [*tokenizer.encode(text), tokenizer.token_to_id("<|user|>")]
        return super().forward(ids_1T, attention=attention)


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_of_the_package_goes_without_a_thread(stream):
    """It asks for a conversation that the server holds, is refused in the way that it knows, and sends everything."""
    called = []

    @anthropic.beta_tool
    def add(a: int, note: str) -> str:
        """Adds."""
        called.append((a, note))
        return "42"

    sdk = sdk_of(model=TurnsModel("", 4096))
    fields = {"model": "tiny", "max_tokens": 200, "messages": USER, "tools": [add], "stream": stream}
    turns = [turn.get_final_message() if stream else turn for turn in sdk.beta.messages.tool_runner(**fields)]
    assert called == [(12, "é")] and [turn.stop_reason for turn in turns] == ["tool_use", "end_turn"]
    assert turns[1].content[0].text == "It is 42."


def test_a_thread_is_refused_with_what_to_do():
    with pytest.raises(anthropic.BadRequestError, match="send all messages"):
        sdk_of("ok").beta.messages.create(model="tiny", max_tokens=8, messages=USER, thread={"type": "create"})
