"""`glm5 serve` as a real process with the real OpenAI client, and `glm5 chat` over prepared lines."""

import io
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import openai
import pytest
import tyro
from rich.console import Console
from speaker import ScriptedModel, speaker_model, speaker_tokenizer

import glm5
from glm5.cli import chat as chat_verb
from glm5.cli.chat import ChatOptions, converse
from glm5.cli.serve import ServeOptions, run
from glm5.engine import Engine
from glm5.errors import InputError, RunError
from glm5.train import RunDirectory

START = "import sys; from glm5.cli.serve import *; run(ServeOptions(model=Path(sys.argv[1]), port=0, name='tiny'))"


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
        assert process.wait(timeout=20) == 0


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
    with pytest.raises(openai.NotFoundError, match="is not served here"):
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
    assert options.host == "127.0.0.1"
    chat = tyro.cli(ChatOptions, args=["runs/a", "--no-thinking"])
    assert chat == ChatOptions(model=Path("runs/a"), thinking=False)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(RunError, match="neither a run nor a model directory"):
        run(ServeOptions(model=tmp_path))


def talk(text, lines, **options):
    """What the terminal shows, and the prompts that the model saw."""
    engine = Engine(ScriptedModel(text), speaker_tokenizer())
    prompts, stream = [], engine.stream
    engine.stream = lambda ids, params: (prompts.append(speaker_tokenizer().decode(ids)), stream(ids, params))[1]
    said = iter(lines)

    def read():
        line = next(said, None)
        if line is None:
            raise EOFError
        return line

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    code = converse(engine, ChatOptions(model="x", max_tokens=60, **options), console, read)
    return code, screen.getvalue(), prompts


def test_thinking_is_dimmed_and_the_conversation_goes_on():
    code, screen, prompts = talk(
        "so[b]</think>42 [x]", ["12 + 30?", "", "and now?", "/exit", "never read"], system="Be brief."
    )
    assert code == 0
    assert screen.count("42 [x]") == 2  # markup of the answer is text
    assert "\x1b[2m" in screen.split("42 [x]")[0]
    assert "\x1b[2m42" not in screen
    assert prompts[0] == "[gMASK]<sop><|system|>Be brief.<|user|>12 + 30?<|assistant|><think>"
    assert prompts[1].endswith("12 + 30?<|assistant|></think>42 [x]<|user|>and now?<|assistant|><think>")
    assert len(prompts) == 2


def test_commands_and_refusals_leave_the_conversation_as_it_was():
    _, screen, prompts = talk("</think>ok", ["one", "/new", "/what", "x" * 600, "two"])
    assert "/exit ends" in screen and "context limit is 512" in screen
    assert prompts[-1] == "[gMASK]<sop><|user|>two<|assistant|><think>"


def test_calls_of_different_turns_have_different_identities(monkeypatch):
    ids = []

    class Seen(glm5.AssistantStream):
        def finish(self):
            message = super().finish()
            ids.extend(call["id"] for call in message["tool_calls"])
            return message

    monkeypatch.setattr(chat_verb, "AssistantStream", Seen)
    talk("</think><tool_call>f</tool_call>", ["one", "two"])
    assert len(ids) == len(set(ids)) == 2


def test_a_conversation_needs_a_tokenizer(tmp_path):
    glm5.save_model(speaker_model(), tmp_path)
    with pytest.raises(InputError, match=r"needs a tokenizer.*tokenizer\.json"):
        chat_verb.run(ChatOptions(model=tmp_path))


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said():
    engine = Engine(ScriptedModel("</think>one two three four"), speaker_tokenizer())
    whole, lines = engine.stream, iter(["go", "on"])
    prompts = []

    def interrupted(ids, params):
        prompts.append(speaker_tokenizer().decode(ids))
        for number, token in enumerate(whole(ids, params)):
            if len(prompts) == 1 and number == 5:
                raise KeyboardInterrupt
            yield token

    engine.stream = interrupted
    screen = io.StringIO()

    def read():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(engine, ChatOptions(model="x", max_tokens=60), Console(file=screen), read)
    assert "[stopped]" in screen.getvalue()
    first = screen.getvalue().split("\n")[0].strip()
    assert first and "four" not in first
    assert f"</think>{first}<|user|>on" in prompts[1]
