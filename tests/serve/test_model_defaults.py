"""The settings of a model's `generation_config.json`: where they hold, and where the request's own win."""

import json

import pytest
from fastapi.testclient import TestClient
from speaker import ScriptedModel, speaker_tokenizer

from glm5.engine import Engine, SamplingDefaults, SamplingParams
from glm5.errors import CheckpointError
from glm5.serve import create_app

ADVICE = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1)
TALK = {"messages": [{"role": "user", "content": "Hi"}]}
ENDPOINTS = {
    "/v1/chat/completions": {"model": "tiny", "max_tokens": 4, **TALK},
    "/v1/completions": {"model": "tiny", "max_tokens": 4, "prompt": "Hi"},
    "/v1/responses": {"model": "tiny", "max_output_tokens": 4, "input": "Hi"},
    "/v1/messages": {"model": "tiny", "max_tokens": 4, **TALK},
}


def asked(defaults, path, **fields):
    """The settings with which the engine was asked."""
    engine, seen = Engine(ScriptedModel("</think>ok"), speaker_tokenizer()), []
    stream = engine.stream
    engine.stream = lambda ids, params, **place: (seen.append(params), stream(ids, params, **place))[1]
    client = TestClient(create_app(engine, model_name="tiny", defaults=defaults))
    reply = client.post(path, json={**ENDPOINTS.get(path, {}), **fields})
    assert reply.status_code == 200, reply.text
    return {name: getattr(seen[0], name) for name in ADVICE.under()}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_defaults_hold_where_a_request_names_nothing_and_its_own_win(path):
    plain = {name: getattr(SamplingParams(), name) for name in ADVICE.under()}
    assert asked(SamplingDefaults(), path) == plain
    assert asked(ADVICE, path) == ADVICE.under()
    own = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    assert asked(ADVICE, path, **own) == ADVICE.under(**own)
    assert asked(ADVICE, path, temperature=None) == ADVICE.under()


def test_generate_does_what_it_is_told_and_nothing_else():
    body = {"token_ids": [40, 41], "sampling_params": {"max_tokens": 2}}
    assert asked(ADVICE, "/inference/v1/generate", **body) == asked(
        SamplingDefaults(), "/inference/v1/generate", **body
    )


def test_a_directory_states_them(tmp_path):
    assert SamplingDefaults.from_directory(tmp_path) == SamplingDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [1], "temperature": 1.0, "top_p": 0.95, "do_sample": True}))
    assert SamplingDefaults.from_directory(tmp_path) == SamplingDefaults(temperature=1.0, top_p=0.95)
    wrong = {"{": "no JSON", "[]": "one JSON object", '{"top_p": 3}': "top_p is 3", '{"top_k": "x"}': "top_k is 'x'"}
    for text, sentence in wrong.items():
        path.write_text(text)
        with pytest.raises(CheckpointError, match=sentence) as refusal:
            SamplingDefaults.from_directory(tmp_path)
        assert str(path) in str(refusal.value)
