"""`torchrun -m glm5 serve` with two processes: a request over HTTP, and how they end."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.cli import serve as verb
from glm5.cli.serve import ServeOptions, run
from glm5.engine import Engine
from glm5.errors import InputError, ParallelError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "glm5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def test_two_processes_answer_as_one_and_end_with_ctrl_c(model):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "serve", str(model), "--port", "0", "--tensor-parallel", "2", "--expert-parallel", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Serving glm5 at "), process.stderr.read()
            body = {"model": "glm5", "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True,
                    "return_token_ids": True}  # fmt: skip
            request = urllib.request.Request(
                f"{line.split()[-1]}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as reply:
                answer = json.load(reply)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
            errors = process.stderr.read()
        finally:
            process.kill()
    greedy = glm5.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    [alone] = Engine(model).generate([[5, 6, 7]], greedy)
    assert tuple(answer["choices"][0]["token_ids"]) == alone.token_ids
    assert "ParallelError" not in errors and "has ended" not in errors


def test_a_server_whose_engine_is_given_up_drains_and_ends_with_the_sentence(model, monkeypatch):
    engine = Engine(model)
    engine.leader = SimpleNamespace(on_lost=None, close=lambda: None)
    monkeypatch.setattr(ServeOptions, "engine", lambda *_, **__: engine)
    monkeypatch.setattr(verb, "log_json_lines", lambda **_: None)
    draining = []

    def served(app, *_, **__):
        engine.leader.on_lost("Process 1 is gone.")
        draining.append(app.state.lifecycle.draining)

    monkeypatch.setattr(verb, "serve", served)
    with pytest.raises(ParallelError, match="Process 1 is gone"):
        run(ServeOptions(model=model, port=0))
    assert draining == [True]


@pytest.mark.parametrize(
    ("options", "world", "sentence"),
    [
        ({"tensor_parallel": 2}, 1, "but 1 run; start 2 with `torchrun"),
        ({}, 2, "but 2 run; ask for tensor=2, expert=2"),
        ({"tensor_parallel": 2, "backend": "http://127.0.0.1:1"}, 2, "With --backend another server computes"),
    ],
)
def test_processes_that_do_not_fit_are_refused(model, options, world, sentence, monkeypatch):
    monkeypatch.setattr(verb, "world_size", lambda: world)
    with pytest.raises(InputError, match=sentence):
        run(ServeOptions(model=model, port=0, **options))
