"""What every endpoint has around it: the key, ids, logs, metrics, limits, draining."""

import io
import json
import logging
import time
from types import SimpleNamespace

import pytest
from chat_client import USER, ask, client_of
from prometheus_client.parser import text_string_to_metric_families

from glm5.engine import SamplingParams, TokenDelta
from glm5.engine.core import Core
from glm5.errors import InputError
from glm5.serve import Limits
from glm5.serve.access_log import JsonLines, generated
from glm5.serve.auth import check_key
from glm5.serve.generation import Generation
from glm5.serve.host_check import OWN_NAMES
from glm5.serve.http import is_loopback
from glm5.serve.limits import deadline_of

KEY = "sk-Zq81 not a word of this may be logged"


@pytest.fixture
def lines():
    """The server's log as it is written."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("glm5.serve")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(before)


# ---- the key -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY},
     {"x-api-key": KEY, "Authorization": "Bearer other"}],
)  # fmt: skip
def test_the_key_opens_the_api_in_either_header(headers):
    client = client_of("</think>ok", api_key=KEY)
    assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": KEY}, {"Authorization": "Bearer "}, {"x-api-key": KEY[:-1]},
                                     {"Authorization": f"Basic {KEY}"}, {"x-api-key": ""}])  # fmt: skip
def test_without_the_key_nothing_is_served_but_health_and_the_page(headers, lines):
    client = client_of("</think>ok", api_key=KEY)
    for method, path in [("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/chat/completions"),
                         ("POST", "/"), ("GET", "/nothing")]:  # fmt: skip
        reply = client.request(method, path, headers=headers)
        assert reply.status_code == 401 and "API key" in reply.json()["error"]["message"]
        assert reply.headers["www-authenticate"] == "Bearer"
    anthropic = client.post("/v1/messages", headers=headers).json()
    assert anthropic["type"] == "error" and anthropic["error"]["type"] == "authentication_error"
    assert client.get("/health", headers=headers).status_code == client.get("/", headers=headers).status_code == 200
    assert lines() and KEY[:-1] not in json.dumps(lines())


@pytest.mark.parametrize("key", ["", " x", "x\n", "schlüssel"])
def test_keys_that_no_header_carries_are_refused(key):
    with pytest.raises(InputError, match="printable ASCII"):
        check_key(key)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "LOCALHOST", "[::1]:8000", "[::1]", "lab.example:80"])
def test_the_names_of_this_machine_are_answered(host):
    client = client_of("</think>ok", hosts=(*OWN_NAMES, "Lab.example"))
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "localhost@evil.example", "[::1", ""])
def test_a_foreign_name_for_this_machine_is_refused_everywhere(host):
    client = client_of("</think>ok", hosts=OWN_NAMES)
    for path in ("/v1/models", "/", "/health", "/metrics"):
        reply = client.get(path, headers={"Host": host})
        assert reply.status_code == 421 and "--allow-host" in reply.json()["error"]["message"]


def test_loopback_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "localhost", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.4", "example.org"]))


# ---- ids and logs ------------------------------------------------------------------------------------------------
def test_a_request_id_is_echoed_or_made():
    client = client_of("</think>ok")
    reply = client.get("/v1/models", headers={"X-Request-ID": "trace-7.a_b:c"})
    assert reply.headers["x-request-id"] == reply.headers["request-id"] == "trace-7.a_b:c"
    for given in ({}, {"X-Request-ID": "two words"}, {"X-Request-ID": "x" * 200}, {"X-Request-ID": ""}):
        made = client.get("/nothing", headers=given).headers["x-request-id"]
        assert made.startswith("req_") and len(made) == 28


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_without_its_text(lines, stream):
    messages = [{"role": "user", "content": "pomegranate"}]
    reply = ask(client_of("kumquat</think>tangerine"), messages=messages, stream=stream)
    assert reply.status_code == 200
    (line,) = lines()
    assert (line["method"], line["route"], line["status"], line["complete"]) == (
        "POST", "/v1/chat/completions", 200, True,
    )  # fmt: skip
    assert line["request_id"] == reply.headers["x-request-id"] and line["seconds"] > 0
    assert not any(word in json.dumps(line) for word in ("pomegranate", "kumquat", "tangerine"))


def test_an_exception_is_logged_by_type_and_place(lines):
    try:
        raise ValueError("pomegranate")
    except ValueError:
        logging.getLogger("glm5.serve").exception("a request failed")
    (line,) = lines()
    assert line["exception"] == "ValueError" and "test_outside.py" in line["at"][0]
    assert "pomegranate" not in json.dumps(line)


# ---- metrics -----------------------------------------------------------------------------------------------------
def metrics_of(client):
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics_count_requests_by_route():
    client = client_of("</think>ok")
    ask(client)
    client.get("/nothing/pomegranate")
    client.get("/nothing/kumquat")
    found = metrics_of(client)
    assert found["glm5_http_requests_total", "POST", "/v1/chat/completions", "200"] == 1
    assert found["glm5_http_requests_total", "GET", "unknown", "404"] == 2
    assert found["glm5_requests_running",] == found["glm5_draining",] == 0
    assert "kumquat" not in str(found)


def test_the_time_between_tokens_is_that_of_each_sample(monkeypatch):
    moments = iter([9.5, 10.0, 11.0, 12.0, 13.0, 14.0, 16.0, 20.0])
    monkeypatch.setattr(
        "glm5.serve.generation.time", SimpleNamespace(time=time.time, perf_counter=lambda: next(moments))
    )
    source = SimpleNamespace(version=0)
    generation = Generation(source, [[1], [2]], SamplingParams(n=2))
    assert generated(generation, 9.0)["first_token_seconds"] is generated(generation, 9.0)["token_seconds"] is None
    for sample in (1, 0, 1, 0, 1, 3, 0):  # at 10 and so on; the third of four has none yet, and the last has one
        generation.samples[sample].take(TokenDelta(sample % 2, 5, 0.0, (), 0, ""))
    figures = generated(generation, 9.0)
    assert (figures["first_token_seconds"], figures["output_tokens"]) == (1.0, 7)
    assert figures["token_seconds"] == ((14 - 10) + (20 - 11)) / (2 + 2)


def test_the_share_of_the_prefix_cache_is_one_of_prompt_tokens():
    client = client_of("</think>ok")
    for _ in range(2):
        reply = client.post("/v1/completions", json={"model": "tiny", "prompt": [7] * 130, "max_tokens": 40})
        assert reply.status_code == 200
    assert metrics_of(client)["glm5_engine_prefix_hit_ratio",] == 128 / 260


def test_health_answers_a_question_without_a_body():
    reply = client_of("ok", api_key=KEY).head("/health")
    assert reply.status_code == 200 and int(reply.headers["content-length"]) > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_has_failed_shows_in_health_and_takes_nothing_new(monkeypatch):
    client = client_of("</think>ok")
    assert client.get("/health").json()["status"] == "ready"
    with monkeypatch.context() as broken:
        broken.setattr(Core, "next_deadline", property(lambda core: 1 / 0))  # what its thread asks between two steps
        assert ask(client).status_code == 200  # the first step is the whole answer
        client.app.state.service.source._thread.join(120)
    health = client.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "engine failed"
    refused = ask(client)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert "ended by a mistake of its own (ZeroDivisionError)" in refused.json()["error"]["message"]
    client.app.state.lifecycle.draining = True
    assert client.get("/health").json()["status"] == "draining"


@pytest.mark.parametrize("seconds", ["nan", "-1", "0", "soon"])
def test_times_that_are_none_are_refused(seconds):
    client = client_of("</think>ok")
    body = {"model": "tiny", "messages": USER}
    refused = client.post("/v1/chat/completions", json=body, headers={"X-Request-Timeout": seconds})
    assert refused.status_code == 400 and "seconds above 0" in refused.json()["error"]["message"]


@pytest.mark.parametrize(("most", "used"), [(None, 604_800), (60, 60)])
@pytest.mark.parametrize("seconds", ["604801", "1e300", "inf"])
def test_more_time_than_any_clock_waits_for_is_the_most_there_is(seconds, most, used):
    assert deadline_of({"x-request-timeout": seconds}, Limits(deadline_seconds=most)) == used
    assert deadline_of({"x-request-timeout": "5"}, Limits(deadline_seconds=most)) == 5
    client = client_of("</think>ok", limits=Limits(deadline_seconds=most))
    body = {"model": "tiny", "messages": USER}
    assert client.post("/v1/chat/completions", json=body, headers={"X-Request-Timeout": seconds}).status_code == 200


# ---- draining ----------------------------------------------------------------------------------------------------
def test_a_draining_server_says_so_and_takes_nothing_new():
    client = client_of("</think>ok")
    client.app.state.lifecycle.draining = True
    health = client.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "draining"
    refused = ask(client)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
    assert "about to end" in refused.json()["error"]["message"]
    assert client.get("/metrics").status_code == 200
