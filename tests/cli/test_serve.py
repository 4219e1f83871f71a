"""`glm5 serve` as a real process with the real OpenAI client."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import openai
import pytest
import tyro
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli.serve import ServeOptions, run
from glm5.errors import InputError, RunError
from glm5.train import RunDirectory

START = "import sys; from glm5.cli.serve import *; run(ServeOptions(model=Path(sys.argv[1]), port=0, name=('tiny',)))"


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run directory with a model in it."""
    run = RunDirectory.start(tmp_path_factory.mktemp("run"), stage="test", config={}, inputs={})
    glm5.save_model(speaker_model(), run.model_directory, speaker_tokenizer())
    return run.path


@pytest.fixture(scope="module")
def base_url(run_directory):
    """A live server on a free loopback port; Ctrl-C must end it cleanly."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START, str(run_directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        line = process.stdout.readline()
        assert line.startswith("Serving tiny at http://127.0.0.1:")
        yield line.split()[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0


def test_the_openai_client_reads_whole_and_streamed_replies(base_url):
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "seed": 5, "max_tokens": 12, "n": 2}
    whole = client.chat.completions.create(**ask, logprobs=True, extra_body={"ignore_eos": True})
    assert whole.usage.completion_tokens == 24
    assert all(len(choice.logprobs.content) == 12 and choice.finish_reason == "length" for choice in whole.choices)
    stream = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
    )
    pieces, usage = {0: "", 1: ""}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            extra = choice.delta.model_extra or {}
            pieces[choice.index] += (extra.get("reasoning_content") or "") + (choice.delta.content or "")
    assert usage == whole.usage
    said = lambda m: (m.model_extra["reasoning_content"] or "") + (m.content or "")
    assert [pieces[0], pieces[1]] == [said(choice.message) for choice in whole.choices]


def test_the_openai_client_reads_refusals(base_url):
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="context limit is 512"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=1000)
    with pytest.raises(openai.NotFoundError, match="ask for 'tiny'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.InternalServerError, match="has no embeddings"):
        client.embeddings.create(model="tiny", input="x")


def test_a_client_that_leaves_gives_its_place_back(base_url):
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "Hi"}]
    for _ in range(3):
        stream = client.chat.completions.create(
            model="tiny", messages=messages, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    for _ in range(100):
        with urllib.request.urlopen(base_url.removesuffix("/v1") + "/health") as reply:
            if b'"running":0' in reply.read():
                return
    pytest.fail("abandoned requests still run")


def test_a_port_that_is_taken_is_refused(base_url, run_directory):
    port = int(base_url.split(":")[2].split("/")[0])
    with pytest.raises(InputError, match=f"Cannot listen on 127.0.0.1:{port}"):
        run(ServeOptions(model=run_directory, port=port))
    with pytest.raises(InputError, match="port is 70000"):
        run(ServeOptions(model=run_directory, port=70000))


def test_flags_become_options():
    options = tyro.cli(ServeOptions, args=["runs/a", "--port", "0", "--dtype", "bfloat16", "--max-model-len", "100"])
    assert options == ServeOptions(model=Path("runs/a"), port=0, dtype="bfloat16", max_model_len=100)
    assert options.host == "127.0.0.1" and options.names == ("glm5",)
    named = tyro.cli(
        ServeOptions, args=["--name", "a", "--name", "b", "runs/a", "--max-n", "256", "--max-messages", "9"]
    )
    assert (named.names, named.model) == (("a", "b"), Path("runs/a"))
    assert (named.limits().max_n, named.limits().max_messages) == (256, 9)


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [("--deadline", "1e300", "at most 604800 seconds"), ("--deadline", "nan", "more than 0"),
     ("--deadline", "0", "more than 0"), ("--stall", "nan", "more than 0")],
)  # fmt: skip
def test_times_that_no_clock_can_wait_for_are_refused(flag, value, sentence):
    with pytest.raises(InputError, match=sentence):
        tyro.cli(ServeOptions, args=[flag, value]).limits()
    assert tyro.cli(ServeOptions, args=["--deadline", "604800"]).limits().deadline_seconds == 604800


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(RunError, match="neither a run nor a model directory"):
        run(ServeOptions(model=tmp_path))
