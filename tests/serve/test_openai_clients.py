"""A real server over random weights, asked by the real `openai` package and by `curl`."""

import json
import subprocess
import threading

import openai
import pytest
from chat_client import ADD
from live_server import live
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine
from glm5.serve import create_app

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "seed": 2}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def url():
    engine = Engine(speaker_model(positions=4096), speaker_tokenizer(), strict=True)
    with live(create_app(engine, model_name="tiny")) as base:
        yield base
    engine.close()


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_whole_and_streamed(client, choice):
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
                "required": ["a", "b"],
            },
        },
    }
    ask = {**ASK, "tools": [tool], "tool_choice": choice, "max_tokens": 200, "extra_body": OFF,
           "parallel_tool_calls": False}  # fmt: skip
    whole = client.chat.completions.create(**ask).choices[0]
    (call,) = whole.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert whole.finish_reason == "tool_calls" and isinstance(arguments["a"], int) and arguments["b"] in "xy"
    pieces, name = "", ""
    for chunk in client.chat.completions.create(**ask, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            name += part.function.name or ""
            pieces += part.function.arguments or ""
    assert (name, pieces) == (call.function.name, call.function.arguments)


def test_a_parsed_answer(client):
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
              "additionalProperties": False}  # fmt: skip
    named = {"type": "json_schema", "json_schema": {"name": "flag", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(**ASK, response_format=named, max_tokens=120, extra_body=OFF)
    assert isinstance(json.loads(reply.choices[0].message.content)["on"], bool)


def test_settings_that_change_the_tokens(client):
    plain = {**ASK, "max_tokens": 12, "temperature": 0}
    extra = {**OFF, "ignore_eos": True, "return_token_ids": True}
    ids = lambda **fields: client.chat.completions.create(
        **plain, **{k: v for k, v in fields.items() if k != "extra"}, extra_body={**extra, **fields.get("extra", {})}
    ).choices[0].model_extra["token_ids"]  # fmt: skip
    usual = ids()
    assert ids() == usual
    assert ids(logit_bias={str(usual[0]): -100})[0] != usual[0]
    never_twice = ids(frequency_penalty=2, presence_penalty=2, extra={"repetition_penalty": 50.0})
    assert len(set(never_twice)) > len(set(usual)) or len(set(usual)) == 12
    assert ids(extra={"top_k": 1, "min_p": 0.1}) == usual


def test_prompt_logprobs_and_weight_versions(client):
    extra = {"prompt_logprobs": 1, "return_token_ids": True, **OFF}
    reply = client.chat.completions.create(**ASK, max_tokens=3, extra_body=extra)
    ids = reply.model_extra["prompt_token_ids"]
    found = reply.model_extra["prompt_logprobs"]
    assert found[0] is None and all(str(token) in entry for token, entry in zip(ids[1:], found[1:], strict=True))
    assert reply.model_extra["weight_version"] == 0 and reply.system_fingerprint == "glm5-weights-0"


def test_the_other_endpoints_read_as_the_package_expects(client):
    assert client.models.retrieve("tiny").id == "tiny"
    ask = {"model": "tiny", "prompt": ["a", "b"], "seed": 4, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**ask, logprobs=1)
    texts = ["", ""]
    for chunk in client.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices] and len(whole.choices[0].logprobs.tokens) == 8
    response = client.responses.create(model="tiny", input="?", max_output_tokens=20, extra_body={"seed": 4})
    events = client.responses.create(model="tiny", input="?", max_output_tokens=20, extra_body={"seed": 4}, stream=True)
    final = list(events)[-1].response
    assert final.usage.output_tokens == response.usage.output_tokens
    assert [item.type for item in final.output] == [item.type for item in response.output]


def test_images_audio_and_files_are_refused_with_a_sentence(client):
    for part in (
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
    ):
        with pytest.raises(openai.BadRequestError, match="GLM-5 reads text only"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part]}])


def test_the_second_request_of_a_session_is_cached(client):
    messages = [{"role": "user", "content": "the quick brown fox " * 40}]
    ask = {"model": "tiny", "messages": messages, "max_tokens": 2, "extra_headers": {"X-Session-ID": "s1"}}
    first, second = (client.chat.completions.create(**ask).usage for _ in range(2))
    assert second.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens


def test_curl(url):
    body = json.dumps({**ASK, "stream": True, "max_tokens": 4, "tools": [ADD]})
    command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert said.startswith('data: {"id": "chatcmpl-') and said.endswith("data: [DONE]\n\n")


def test_clients_at_once_get_what_they_get_alone(client):
    ask = lambda seed: client.chat.completions.create(
        **{**ASK, "seed": seed}, max_tokens=16, extra_body={"return_token_ids": True, "ignore_eos": True}
    ).choices[0].model_extra["token_ids"]  # fmt: skip
    alone = [ask(seed) for seed in range(6)]
    together: list = [None] * 6

    def keep(seed):
        together[seed] = ask(seed)

    threads = [threading.Thread(target=keep, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert together == alone
