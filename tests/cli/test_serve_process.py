"""`glm5 serve` as a process: how it ends, and that a killed one serves again."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from live_server import kept_port
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli import serve as verb
from glm5.cli.serve import ServeOptions, run
from glm5.engine import SamplingDefaults
from glm5.errors import InputError
from glm5.rl.gateway import read_session
from glm5.train.run_directory import directory_sha256

SLOW = """
import sys, time
if float(sys.argv[1]):
    from glm5.engine.core import Core
    from glm5.serve import http
    http.LAST_WORDS_SECONDS = 60.0  # slow steps on a busy machine
    step = Core.step
    Core.step = lambda self, now: (time.sleep(float(sys.argv[1])), step(self, now))[1]
from glm5.cli.main import main
sys.exit(main(["serve", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return str(directory)


@contextmanager
def server(*arguments, slow=0.0, **environment):
    """The process and its address; it is killed at the end if it still runs."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", SLOW, str(slow), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Serving "), process.stderr.read()
            yield process, line.split()[-1].removesuffix("/v1")
        finally:
            process.kill()


def post(url, tokens, **headers):
    body = {"model": "glm5", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)["usage"]["completion_tokens"]


def busy(url):
    """How many requests run and wait."""
    with urllib.request.urlopen(f"{url}/health", timeout=300) as reply:
        body = json.load(reply)
    return body["running"], body["waiting"]


def running(url):
    return busy(url)[0]


def until_draining(url):
    """Waits until the server has seen the signal."""
    while True:
        try:
            running(url)
        except urllib.error.HTTPError as error:
            if json.load(error)["status"] == "draining":
                return


def begin(url, tokens):
    """A request in a thread, once the server runs it."""
    found = []

    def ask():
        try:
            found.append(post(url, tokens))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not running(url):
        assert thread.is_alive(), found
        time.sleep(0.01)
    return thread, found


def test_a_signal_lets_the_running_request_end_and_the_code_is_0(model):
    with server(model, "--port", 0, slow=0.1) as (process, url):
        thread, found = begin(url, 60)
        process.send_signal(signal.SIGINT)
        until_draining(url)
        with pytest.raises(urllib.error.HTTPError) as refusal:
            post(url, 1)
        thread.join()
        assert found == [60] and process.wait(timeout=300) == 0
        assert refusal.value.code == 503 and refusal.value.headers["Retry-After"] == "5"
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert {line["status"] for line in lines if line["method"] == "POST"} == {200, 503}


ENDLESS = {"model": "glm5", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400, "ignore_eos": True}
BODIES = {
    "chat": ("/v1/chat/completions", ENDLESS),
    "chat, streamed": ("/v1/chat/completions", {**ENDLESS, "stream": True}),
    "messages": ("/v1/messages", {"stream": True, **{k: v for k, v in ENDLESS.items() if k != "ignore_eos"}}),
    "responses": ("/v1/responses", {"model": "glm5", "input": "Hi", "max_output_tokens": 400, "ignore_eos": True}),
    "ids": ("/inference/v1/generate", {"token_ids": [40], "sampling_params": {"max_tokens": 400, "ignore_eos": True}}),
    "waits": ("/v1/chat/completions", ENDLESS),
    "waits, streamed": ("/v1/chat/completions", {**ENDLESS, "stream": True}),
}  # fmt: skip


def test_requests_that_outlast_the_drain_are_answered_with_what_is_there_and_the_code_is_0(model):
    found = {}

    def ask(url, name):
        path, body = BODIES[name]
        request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                found[name] = reply.read().decode()
        except urllib.error.HTTPError as error:
            found[name] = f"{error.code} {error.read().decode()}"

    with server(model, "--port", 0, "--drain", 0.2, "--max-concurrent", 5, slow=0.2) as (process, url):
        threads = [threading.Thread(target=ask, args=(url, name)) for name in BODIES]
        for number, thread in enumerate(threads, 1):
            thread.start()
            while sum(busy(url)) < number:
                time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
        for thread in threads:
            thread.join()
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert json.loads(found["chat"])["choices"][0]["finish_reason"] == "abort"
    assert '"finish_reason": "abort"' in found["chat, streamed"] and found["chat, streamed"].endswith("[DONE]\n\n")
    assert "event: error" in found["messages"] and "or the server ends" in found["messages"]
    assert json.loads(found["responses"])["status"] == "failed"
    assert json.loads(found["ids"])["choices"][0]["finish_reason"] == "abort"
    for name in ("waits", "waits, streamed"):
        assert found[name].startswith("503 ") and "This server ends" in found[name]
    assert [line for line in lines if line["level"] not in ("info", "debug")] == []
    assert {line["status"] for line in lines if line["method"] == "POST"} == {200, 503}


def test_a_client_that_does_not_end_its_request_does_not_hold_the_end(model):
    with server(model, "--port", 0, "--drain", 0.2) as (process, url):
        address = urllib.parse.urlsplit(url)
        with socket.create_connection((address.hostname, address.port), timeout=60) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 9\r\n\r\n"
            client.sendall(head.encode() + b"half")
            while "requests_in_flight 2" not in urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode():
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=300) == 0
            lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [line for line in lines if line["level"] not in ("info", "debug")] == []


def test_the_second_ctrl_c_ends_at_once(model):
    with server(model, "--port", 0, "--drain", 1000, slow=0.2) as (process, url):
        thread, _ = begin(url, 400)
        process.send_signal(signal.SIGINT)
        until_draining(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 130
        thread.join()


def test_a_killed_server_serves_again_on_the_same_port(model):
    with kept_port() as port:
        with server(model, "--port", port, slow=0.05) as (process, url):
            thread, _ = begin(url, 400)
            process.kill()
            process.wait()
            thread.join()
        with server(model, "--port", port) as (_, again):
            assert again == url and post(again, 3) == 3


def test_the_key_comes_from_the_environment_and_is_not_logged(model):
    key = "sk-8f1b"
    with server(model, "--port", 0, "--host", "0.0.0.0", GLM5_API_KEY=key) as (process, url):
        local = url.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(local, 1)
        assert post(local, 1, Authorization=f"Bearer {key}") == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
        errors = process.stderr.read()
    assert key not in errors and "Warning" not in errors


@pytest.mark.parametrize(("host", "key", "warned"), [("0.0.0.0", None, 1), ("0.0.0.0", "k", 0), ("127.0.0.1", None, 0)])
def test_a_server_open_to_the_network_without_a_key_warns(model, host, key, warned, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(verb, "serve", lambda app, *place, **_: served.append(place))
    monkeypatch.setattr(verb, "log_json_lines", lambda **_: None)
    run(ServeOptions(model=Path(model), host=host, port=0, api_key=key))
    assert served == [(host, 0)]
    assert capsys.readouterr().err.count("set GLM5_API_KEY to require a key") == warned


def test_the_models_generation_config_gives_the_defaults(model, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(verb, "create_app", lambda source, **settings: made.append(settings["defaults"]))
    monkeypatch.setattr(verb, "serve", lambda *place, **_: None)
    monkeypatch.setattr(verb, "log_json_lines", lambda **_: None)
    directory = shutil.copytree(model, tmp_path / "model")
    (directory / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.8}')
    for wanted in (True, False):
        run(ServeOptions(model=directory, port=0, generation_config=wanted))
    assert made == [SamplingDefaults(temperature=0.7, top_p=0.8), SamplingDefaults()]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"drain": 0.0}, "--drain is 0.0"), ({"max_concurrent": 0}, "--max-concurrent is 0"),
     ({"deadline": -1.0}, "--deadline"), ({"max_waiting": -1}, "--max-waiting"), ({"max_n": 257}, "--max-n is 257"),
     ({"max_unsent_bytes": 0}, "--max-unsent-bytes"), ({"name": ("",)}, "--name is empty"),
     ({"allow_origin": ("chat.example",)}, "'chat.example' is no origin"), ({"api_key": " "}, "printable ASCII")],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(model, options, sentence):
    with pytest.raises(InputError, match=sentence):
        run(ServeOptions(model=Path(model), port=0, **options))


def test_recorded_use_is_on_the_disk_when_the_server_is_killed(model, tmp_path):
    with server(model, "--port", 0, "--record", tmp_path) as (process, url):
        assert post(f"{url}/s/mine", 3) == 3 and post(url, 3) == 3
        request = urllib.request.Request(
            f"{url}/rl/sessions/mine/reward",
            data=b'{"value": 0.5, "reason": "useful"}',
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            assert json.load(reply)["reward"] == {"value": 0.5, "reason": "useful"}
        process.kill()
        assert "Reading the weights, by which recorded sessions are known" in process.stderr.read()
    (path,) = (tmp_path / "finished").iterdir()
    session = read_session(path)
    assert session.weights == directory_sha256(Path(model)) and session.reward.value == 0.5
    assert [len(recorded.turn.output_ids) for recorded in session.turns] == [3]
