"""`/v1/responses` with the real `openai` package: whole, streamed, tools, formats, and the store."""

import json

import httpx
import openai
import pytest
from chat_client import client_of
from fastapi.testclient import TestClient
from scripted import ScriptedSource
from speaker import speaker_model, speaker_tokenizer

from glm5.errors import InputError
from glm5.serve import create_app
from glm5.serve.response_items import ResponseItems
from glm5.serve.response_store import ResponseStore
from glm5.serve.responses_schema import input_messages

TOOL = {
    "type": "function", "name": "add", "strict": True,
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                   "additionalProperties": False},
}  # fmt: skip
CALL = "<tool_call>add<arg_key>a</arg_key><arg_value>12</arg_value></tool_call>"
OFF = {"reasoning": {"effort": "none"}}


def openai_over(test_client):
    """The real client, its requests handed to the app in this process."""

    def handle(request):
        answer = test_client.request(
            request.method, request.url.raw_path.decode(), content=request.content,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)

    transport = httpx.MockTransport(handle)
    return openai.OpenAI(
        base_url="http://test/v1", api_key="x", max_retries=0, http_client=httpx.Client(transport=transport)
    )


def scripted(text):
    return openai_over(client_of(text))


def test_a_turn_becomes_items():
    response = scripted(f"add them</think>I add.{CALL}").responses.create(model="tiny", input="12?", tools=[TOOL])
    reasoning, message, call = response.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "add them")
    assert (message.role, response.output_text) == ("assistant", "I add.")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 12})
    assert response.status == "completed" and response.usage.output_tokens_details.reasoning_tokens > 0
    assert len({reasoning.id, message.id, call.id, call.call_id}) == 4


@pytest.mark.parametrize("text", [f"add</think>I add.{CALL}{CALL}", "hm</think>The answer.", CALL, "", "thinking only"])
def test_the_events_add_up_to_the_response(text):
    events = list(scripted(text).responses.create(model="tiny", input="12?", tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    final = events[-1].response
    said = {}
    for event in events:
        if event.type.endswith(".delta"):
            said[event.item_id] = said.get(event.item_id, "") + event.delta
    for item in final.output:
        kept = item.arguments if item.type == "function_call" else item.content[0].text
        assert said[item.id] == kept and item.status == "completed"
    whole = scripted(text).responses.create(model="tiny", input="12?", tools=[TOOL])
    shape = lambda output: [i.model_dump(exclude={"id", "call_id"}) for i in output]
    assert shape(whole.output) == shape(final.output)
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert done == [item.id for item in final.output]


def test_a_long_item_takes_linear_time():
    """Neither the open item nor an event holds what was said before: adding to a text copies all of it each time."""
    items = ResponseItems("seed")
    call = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": ""}}
    more = {"tool_calls": [{"index": 0, "function": {"arguments": "y" * 50}}]}
    for part in (*[{"reasoning_content": "r" * 50}] * 100, *[{"content": "x" * 50}] * 100, {"tool_calls": [call]},
                 *[more] * 100):  # fmt: skip
        events = [event for event in items.take(part) if event["type"].endswith(".delta")]
        assert all(len(json.dumps(event)) < 300 for event in events)
        assert len(json.dumps(items.items[-1])) < 300
    for _ in items.finish(whole=True):
        pass
    thought, message, called = items.items
    assert thought["content"][0]["text"] == "r" * 5_000 and message["content"][0]["text"] == "x" * 5_000
    assert called["arguments"] == "y" * 5_000


def test_the_packages_own_stream_helper_reads_the_events():
    with scripted(f"so</think>Yes.{CALL}").responses.stream(model="tiny", input="12?", tools=[TOOL]) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "Yes."


def test_a_random_model_is_forced_and_formatted():
    client = openai_over(client_of(model=speaker_model(positions=4096)))
    ask = {"model": "tiny", "input": "?", "max_output_tokens": 200, "extra_body": {"seed": 1}, **OFF}
    response = client.responses.create(**ask, tools=[TOOL], tool_choice={"type": "function", "name": "add"})
    (call,) = response.output
    assert call.name == "add" and isinstance(json.loads(call.arguments)["a"], int)
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
              "additionalProperties": False}  # fmt: skip
    named = {"type": "json_schema", "name": "flag", "schema": schema, "strict": True}
    response = client.responses.create(**ask, text={"format": named})
    assert isinstance(json.loads(response.output_text)["on"], bool)
    cut = client.responses.create(model="tiny", input="?", max_output_tokens=3, extra_body={"ignore_eos": True})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_stored_response_is_continued_with_its_reasoning():
    app_client = client_of(f"hm</think>{CALL}")
    client = openai_over(app_client)
    first = client.responses.create(model="tiny", input="12?", tools=[TOOL], instructions="Be brief.")
    result = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "42"}
    second = client.responses.create(model="tiny", input=[result], tools=[TOOL], previous_response_id=first.id)
    chat = [{"role": "user", "content": "12?"},
            {"role": "assistant", "reasoning_content": "hm", "content": None,
             "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 12}'}}]},
            {"role": "tool", "content": "42"}]  # fmt: skip
    function = {key: value for key, value in TOOL.items() if key != "type"}
    prompt = speaker_tokenizer().apply_chat_template(chat, tools=[{"type": "function", "function": function}])
    assert second.usage.input_tokens == len(prompt)
    counted = client.responses.input_tokens.count(
        model="tiny", input=[result], tools=[TOOL], previous_response_id=first.id
    )
    assert counted.input_tokens == len(prompt)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    with pytest.raises(openai.BadRequestError, match="given whole"):
        client.responses.retrieve(first.id, stream=True)
    client.responses.delete(first.id)
    for asked in (client.responses.retrieve, client.responses.delete):  # it is gone
        with pytest.raises(openai.NotFoundError, match=r"it was deleted.*Ask anew with POST"):
            asked(first.id)
    unstored = client.responses.create(model="tiny", input="12?", store=False)
    with pytest.raises(openai.BadRequestError, match="Send the whole conversation") as refused:
        client.responses.create(model="tiny", input="and?", previous_response_id=unstored.id)
    assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"


def test_items_of_one_turn_become_one_message():
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {"role": "assistant", "content": "Done."}, {"role": "assistant", "content": "Really."},
    ]  # fmt: skip
    roles = [message["role"] for message in input_messages(items)]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "assistant"]
    turn = input_messages(items)[2]
    assert (turn["reasoning_content"], turn["content"], len(turn["tool_calls"])) == ("hm", "I look.", 2)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "reads text only"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "reads text only"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "is of type 'item_reference'"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "not JSON"),
        ({"input": []}, "at least one message"),
        ({"tools": [{"type": "code_interpreter"}]}, "send a function and run it yourself"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "forces a tool, and there are none"),
        ({"tool_choice": {"type": "web_search"}}, "is not run by this server, so it cannot be chosen"),
        ({"include": ["everything"]}, "include.0"),
        ({"background": True}, "background is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"max_tokens": 5}, "Unknown field 'max_tokens'"),
    ],
)
def test_what_is_refused_has_a_sentence(fields, sentence):
    response = client_of("ok").post("/v1/responses", json={"model": "tiny", "input": "x", **fields})
    assert response.status_code == 400 and sentence in response.json()["error"]["message"], response.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_whose_deadline_passes_has_failed_and_says_why(stream):
    app = create_app(ScriptedSource("</think>word"), model_name="tiny")  # the engine just ends what is given up
    response = TestClient(app).post(
        "/v1/responses", json={"model": "tiny", "input": "x", "stream": stream, "max_output_tokens": 50}
    )
    if stream:
        name, _, data = response.text.strip().rpartition("\n\n")[-1].partition("\n")
        assert name == "event: response.failed"
        found = json.loads(data.removeprefix("data: "))["response"]
    else:
        found = response.json()
    assert found["status"] == "failed" and found["incomplete_details"] is None
    assert found["error"]["code"] == "server_error" and "deadline passed" in found["error"]["message"]
    assert openai.types.responses.ResponseError.model_validate(found["error"])


def test_a_failure_in_the_stream_is_an_event_and_a_store_is_bounded():
    model = speaker_model()
    model.lm_head.weight.data[7, 0] = float("nan")
    response = client_of(model=model).post("/v1/responses", json={"model": "tiny", "input": "x", "stream": True})
    assert "event: error\n" in response.text and "NaN or infinite logits" in response.text
    store = ResponseStore(most=2, most_bytes=200)
    for name in "abc":
        store.put({"id": name}, [])
    assert store.get("c").body == {"id": "c"}
    store.put({"id": "large"}, [{"content": "x" * 300}])
    assert store.bytes == 0
    with pytest.raises(InputError):
        input_messages([{"role": "user", "content": 5}])


@pytest.mark.parametrize("asked", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}])
def test_the_message_has_the_logprobs_of_its_tokens(asked):
    text = f"hm</think>I add.{CALL} So."
    ask = {"model": "tiny", "input": "12?", "tools": [TOOL], **asked}
    message = scripted(text).responses.create(**ask).output[1]
    (part,) = message.content
    tops = asked.get("top_logprobs", 0)
    assert "".join(entry.token for entry in part.logprobs) == part.text == "I add."
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == tops for entry in part.logprobs)
    events = list(scripted(text).responses.create(**ask, stream=True))
    told = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    final = events[-1].response.output
    assert [e.token for e in told[: len(part.logprobs)]] == [e.token for e in part.logprobs]
    assert [e.token for e in final[1].content[0].logprobs] == [e.token for e in part.logprobs]
    (plain,) = scripted(text).responses.create(model="tiny", input="12?", tools=[TOOL]).output[1].content
    assert plain.logprobs == []
