"""Another server as the source of tokens: our own over the real API, and stand-ins for vLLM's and SGLang's."""

import asyncio
import json
import math
import ssl
import time

import httpx
import pytest
from chat_client import USER
from fastapi.testclient import TestClient
from held_source import HeldSource, until
from speaker import ScriptedModel, speaker_model, speaker_tokenizer
from starlette.concurrency import run_in_threadpool

import glm5
from glm5.engine import Engine, SamplingParams, StructuredOutputs
from glm5.errors import InputError
from glm5.serve import create_app
from glm5.serve.backend import Backend
from glm5.serve.backend_api import backend_api


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    glm5.save_model(speaker_model(positions=1024), path, speaker_tokenizer())
    return path


def front(directory, app_or_handler, api="generate", name=None, **options):
    """A client of our server in front of an app, or of a function that answers requests."""
    asgi = hasattr(app_or_handler, "routes")
    transport = httpx.ASGITransport(app_or_handler) if asgi else httpx.MockTransport(app_or_handler)
    backend = Backend("http://backend", directory, backend_api(api, name), transport=transport, **options)
    return TestClient(create_app(backend, model_name="tiny"), raise_server_exceptions=False)


def ask(client, path="/v1/chat/completions", **fields):
    return client.post(path, json={"model": "tiny", "messages": USER, **fields})


@pytest.fixture(scope="module")
def pair(directory):
    """The server itself, and ours in front of it."""
    app = create_app(Engine(directory), model_name="tiny")
    return TestClient(app), front(directory, app)


FIELDS = {"seed": 5, "max_tokens": 12, "n": 2, "logprobs": True, "top_logprobs": 3, "return_token_ids": True,
          "ignore_eos": True}  # fmt: skip


def without_names(body):
    return {key: value for key, value in body.items() if key not in ("id", "created", "usage")}


@pytest.mark.parametrize(
    "fields",
    [
        FIELDS,
        {**FIELDS, "temperature": 0, "stop": ["a", "e"], "ignore_eos": False},
        {**FIELDS, "frequency_penalty": 1.5},
    ],
)
def test_the_backend_gives_what_it_gives_directly(pair, fields):
    direct, through = (ask(client, **{**FIELDS, **fields}) for client in pair)
    assert direct.status_code == through.status_code == 200, through.text
    assert without_names(direct.json()) == without_names(through.json())
    assert direct.json()["usage"]["completion_tokens"] == through.json()["usage"]["completion_tokens"]


def test_streams_and_forced_calls_pass_through(pair):
    number = {"type": "integer", "minimum": 0, "maximum": 99}  # else a random model may write digits without end
    tool = {"name": "say", "input_schema": {"type": "object", "properties": {"n": number}, "required": ["n"],
                                            "additionalProperties": False}}  # fmt: skip
    fields = {"tools": [tool], "tool_choice": {"type": "tool", "name": "say"}, "max_tokens": 100}
    body = ask(pair[1], "/v1/messages", **fields).json()
    assert body["stop_reason"] == "tool_use" and isinstance(body["content"][-1]["input"]["n"], int)
    events = ask(pair[1], stream=True, max_tokens=5, ignore_eos=True).text  # else a random model may end before
    assert events.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in events


def test_what_does_not_fit_is_refused_on_this_side(pair, directory):
    refused = ask(pair[1], max_tokens=5000)
    assert refused.status_code == 400 and "context limit is 1024" in refused.json()["error"]["message"]
    scored = pair[1].post("/v1/completions", json={"model": "tiny", "prompt": "x", "prompt_logprobs": 1})
    assert scored.status_code == 400 and "ask the backend itself" in scored.text
    with pytest.raises(InputError, match="is no URL"):
        Backend("127.0.0.1:80", directory, backend_api("generate"))
    with pytest.raises(InputError, match="--backend-model"):
        backend_api("completions")


# ---- trouble -----------------------------------------------------------------------------------------------------
def sse(*events):
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=text)


def away(_):
    raise httpx.ConnectError("no route")


def slow(_):
    raise httpx.ReadTimeout("nothing")


def answer(status, body):
    return lambda _: httpx.Response(status, json=body)


def said(logprob):
    return {"content": [{"token_id": 40, "logprob": logprob}]}


CHOICE = {"index": 0, "token_ids": [40], "logprobs": said(-1.0)}


@pytest.mark.parametrize(
    ("handler", "status", "sentence"),
    [
        (away, 502, "The backend at http://backend is away (ConnectError)"),
        (slow, 502, "did not answer in time"),
        (answer(400, {"error": {"message": "no such thing"}}), 400, "answered 400: no such thing"),
        (answer(429, {"error": "busy"}), 429, "busy"),
        (answer(401, {"detail": "who?"}), 502, "answered 401"),
        (lambda _: httpx.Response(200, text="<html>"), 502, "no JSON object"),
        (lambda _: sse({"choices": [CHOICE]}), 502, "ended its answer in the middle"),
        (lambda _: sse({"choices": [CHOICE]}, {"error": {"message": "out of memory"}}), 502, "out of memory"),
        (lambda _: sse({"choices": [{"index": 0, "text": "x"}]}), 502, "gives no token ids"),
        (lambda _: sse({"choices": [{**CHOICE, "token_ids": [320]}]}), 502, "a token 320, which the model has not"),
        (lambda _: sse({"choices": [{**CHOICE, "logprobs": None}]}), 502, "gives 0 log-probabilities of 1 tokens"),
        (lambda _: sse({"choices": [{**CHOICE, "token_ids": [40, 41]}]}), 502, "gives 1 log-probabilities of 2"),
        (lambda _: sse({"choices": [{**CHOICE, "logprobs": said(None)}]}), 502, "a log-probability of None"),
        (lambda _: sse({"choices": [{**CHOICE, "logprobs": said(math.nan)}]}), 502, "a log-probability of nan"),
        (lambda _: sse({"choices": [{"index": 0, "token_ids": [], "finish_reason": "stop"}]}), 502, "with which token"),
    ],
)
def test_trouble_with_a_backend_has_a_sentence(directory, handler, status, sentence):
    reply = ask(front(directory, handler))
    assert reply.status_code == status and sentence in reply.json()["error"]["message"]
    streamed = ask(front(directory, handler), stream=True).text
    assert sentence in streamed and "[DONE]" not in streamed


def test_health_knows_whether_the_backend_is_there(directory):
    asked, answers = [], [httpx.Response(503), httpx.ConnectError("no route"), httpx.Response(404), httpx.Response(200)]

    def handler(request):
        asked.append(request.url.path)
        answer = answers[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    client = front(directory, handler)
    found = []
    for _ in answers:
        found += [client.get("/health"), client.get("/health")]
        client.app.state.service.source._asked = -1e9  # what is known has become old
    assert [reply.status_code for reply in found] == [503] * 4 + [200] * 4
    assert [reply.json()["status"] for reply in found] == ["backend away"] * 4 + ["ready"] * 4
    assert asked == ["/health"] * 4  # once for two questions


def test_certificates_are_read_once(directory, monkeypatch):
    made, create = [], ssl.create_default_context
    monkeypatch.setattr("ssl.create_default_context", lambda *_, **options: made.append(options) or create(**options))
    backend = Backend("https://backend", directory, backend_api("generate"))  # without a transport: httpx makes its own
    assert len(made) == 1
    for _ in range(2):
        backend.client(backend.timeout)
    assert len(made) == 1


# ---- the other servers' words ------------------------------------------------------------------------------------
def test_vllms_completions(directory):
    seen = []

    def vllm(request):
        seen.append((request.url.path, json.loads(request.content), request.headers["authorization"]))
        logprobs = {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:40": -0.5, "token_id:41": -2.0}]}
        usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
        return sse({"choices": [{"index": 0, "text": "?", "token_ids": [40], "logprobs": logprobs}]},
                   {"choices": [{"index": 0, "text": "?", "token_ids": [41], "logprobs": logprobs,
                                 "finish_reason": "length"}]}, {"choices": [], "usage": usage})  # fmt: skip

    client = front(directory, vllm, "completions", "zai-org/GLM-5-FP8", api_key="sk-backend")
    choice = ask(
        client, max_tokens=5, **{k: FIELDS[k] for k in ("logprobs", "return_token_ids")}, top_logprobs=2
    ).json()
    assert choice["choices"][0]["token_ids"] == [40, 41] and choice["choices"][0]["finish_reason"] == "length"
    tops = choice["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert [top["logprob"] for top in tops] == [-0.5, -2.0]
    path, body, key = seen[0]
    assert key == "Bearer sk-backend"
    assert path == "/v1/completions" and body["model"] == "zai-org/GLM-5-FP8" and body["return_token_ids"] is True
    assert body["prompt"] == speaker_tokenizer().apply_chat_template(USER) and body["max_tokens"] == 5


@pytest.mark.parametrize("repeats", [False, True])
def test_sglangs_generate(directory, repeats):
    seen = []

    def sglang(request):
        seen.append((request.url.path, json.loads(request.content)))
        events = []
        for n, finish in ((1, None), (2, None), (3, {"type": "length"})):
            first = 0 if repeats else n - 1
            rows = [[-0.1 * i, 40 + i, None] for i in range(first, n)]
            meta = {"completion_tokens": n, "cached_tokens": 4, "finish_reason": finish, "output_token_logprobs": rows,
                    "output_top_logprobs": [[row] for row in rows]}  # fmt: skip
            events.append({"output_ids": [40 + i for i in range(first, n)], "meta_info": meta})
        return sse(*events)

    wanted = {"logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    body = ask(front(directory, sglang, "sglang"), max_tokens=3, seed=7, top_k=5, **wanted).json()
    (choice,) = body["choices"]
    assert choice["token_ids"] == [40, 41, 42] and body["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
    assert [round(entry["logprob"], 3) for entry in choice["logprobs"]["content"]] == [0.0, -0.1, -0.2]
    path, sent = seen[0]
    assert path == "/generate" and sent["input_ids"] == speaker_tokenizer().apply_chat_template(USER)
    assert sent["sampling_params"]["max_new_tokens"] == 3 and sent["sampling_params"]["sampling_seed"] == 7


# ---- giving up ---------------------------------------------------------------------------------------------------
@pytest.fixture
def live(live_server):
    """A slow server on a real port; gives its URL and its app."""
    model = ScriptedModel("word " * 80)
    model.delay = 0.05
    app = create_app(Engine(model, speaker_tokenizer()), model_name="tiny")
    return live_server(app), app


def test_a_request_that_is_given_up_ends_at_the_backend(live, directory):
    url, app = live
    backend = Backend(url, directory, backend_api("generate"))
    client = TestClient(create_app(backend, model_name="tiny"), raise_server_exceptions=False)
    late = client.post("/v1/chat/completions", json={"model": "tiny", "messages": USER, "max_tokens": 400},
                       headers={"X-Request-Timeout": "4"})  # fmt: skip
    assert late.json()["choices"][0]["finish_reason"] == "abort"
    engine = app.state.service.source
    for _ in range(300):
        stats = engine.stats()
        if not stats.running + stats.waiting:
            break
        time.sleep(0.02)
    assert stats.running + stats.waiting == 0 and stats.sampled_tokens < 300


def test_the_tokens_come_one_by_one(live, directory):
    backend = Backend(live[0], directory, backend_api("generate"))

    async def first():
        prompt = speaker_tokenizer().apply_chat_template(USER)
        stream = await run_in_threadpool(backend.stream, prompt, glm5.SamplingParams(max_tokens=400))
        delta = await anext(aiter(stream))
        running = live[1].state.service.source.stats().running
        stream.close()
        await asyncio.sleep(0.01)
        return delta.text, running

    assert asyncio.run(first()) == ("w", 1)


@pytest.mark.parametrize("top", [0, 2])
def test_our_own_completions_are_a_backend_too(directory, top):
    app = create_app(Engine(directory), model_name="theirs")
    direct = TestClient(create_app(Engine(directory), model_name="tiny"))
    through = front(directory, app, "completions", "theirs")
    fields = {**FIELDS, "n": 1, "top_logprobs": top}
    answers = [ask(client, **fields) for client in (direct, through)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[1].text
    assert without_names(answers[0].json()) == without_names(answers[1].json())


@pytest.mark.parametrize(
    ("api", "salt"), [("generate", "cache_salt"), ("completions", "cache_salt"), ("sglang", "extra_key")]
)
def test_a_session_is_a_salt_of_the_backends_cache(directory, api, salt):
    """What one session computed must not be found by another one, at vLLM and SGLang either."""
    bodies = []

    def backend(request):
        bodies.append(json.loads(request.content))
        return httpx.Response(400, json={"error": "enough"})

    client = front(directory, backend, api, "m")
    for session in ("task//one", "task//two", "other", None, ""):
        client.post("/v1/chat/completions", json={"model": "tiny", "messages": USER},
                    headers={} if session is None else {"X-Session-ID": session})  # fmt: skip
    ask(client, cache_salt="tenant")
    found = [body.get(salt) for body in bodies]
    assert found[:5] == ["task", "task", "other", None, None]
    assert found[5].startswith("salt-")


def test_an_empty_session_is_none_at_our_own_backend(pair):
    reply = pair[1].post("/v1/chat/completions", json={"model": "tiny", "messages": USER, "max_tokens": 2},
                         headers={"X-Session-ID": ""})  # fmt: skip
    assert reply.status_code == 200, reply.text


def test_what_may_not_be_sampled_is_a_bias_to_a_backend():
    params = SamplingParams(bad_sequences=[[7]], logit_bias={3: 1.0})
    for api in ("generate", "completions", "sglang"):
        body = backend_api(api, "m").body([1], params, 0)
        said = body.get("sampling_params", body)
        assert said["logit_bias"] == {3: 1.0, 7: -100.0} and "bad_sequences" not in said
    with pytest.raises(InputError, match="bad_words of more than one token"):
        backend_api("generate").body([1], SamplingParams(bad_sequences=[[7, 8]]), 0)
    assert "bad_sequences" not in backend_api("generate").body([1], SamplingParams(), 0)["sampling_params"]


def test_a_grammar_that_begins_in_the_middle_is_not_passed_on():
    lazy = StructuredOutputs(grammar='start: <tool_call> "f"', begins_at="<tool_call>")
    with pytest.raises(InputError, match="begins_at is not passed on"):
        backend_api("sglang").body([1], SamplingParams(structured_outputs=lazy), 0)
    guarded = StructuredOutputs(grammar='start: <tool_call> "f"', unspelled=["</tool_call>"])
    for api in ("generate", "completions"):  # which know no such field
        body = backend_api(api, "m").body([1], SamplingParams(structured_outputs=guarded), 0)
        said = body.get("sampling_params", body)["structured_outputs"]
        assert said == {"grammar": 'start: <tool_call> "f"'}


def test_what_the_server_gives_up_at_its_end_is_no_failure_of_the_backend(directory, live_server):
    source = HeldSource()
    behind = live_server(create_app(source, model_name="tiny"))

    async def go():
        app = create_app(Backend(behind, directory, backend_api("generate")), model_name="tiny")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60) as client:
            asked = asyncio.create_task(client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}))
            await until(lambda: app.state.service.endings.running)
            app.state.service.endings.give_up()
            reply = await asked
        await until(lambda: source.streams[0].closed)
        return reply

    reply = asyncio.run(go())
    assert reply.status_code == 200 and reply.json()["choices"][0]["finish_reason"] == "abort"
