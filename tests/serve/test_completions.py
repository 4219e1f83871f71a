"""`/v1/completions` and `/inference/v1/generate`: raw text and token ids, whole and streamed alike."""

import json

import pytest
from chat_client import client_of
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import SamplingParams
from glm5.serve import generation as generation_module
from glm5.serve.generation import Sample


@pytest.fixture(scope="module")
def client():
    return client_of(model=speaker_model())


def complete(client, **fields):
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "The quick", "max_tokens": 6, **fields})


def generate(client, **fields):
    settings = {"max_tokens": 6, "ignore_eos": True, "logprobs": 2, "seed": 3, **fields.pop("sampling_params", {})}
    body = {"token_ids": [40, 41, 42], "sampling_params": settings, **fields}
    return client.post("/inference/v1/generate", json=body)


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", response.text
    return [json.loads(line) for line in lines[:-1]]


SETTINGS = {"seed": 7, "n": 2, "ignore_eos": True}


def test_text_and_ids_are_the_same_prompt(client):
    ids = speaker_tokenizer().encode("The quick")
    texts = [complete(client, prompt=p, **SETTINGS).json() for p in ("The quick", ["The quick"], ids, [ids])]
    assert texts[0]["object"] == "text_completion" and texts[0]["usage"]["completion_tokens"] == 12
    said = [[choice["text"] for choice in body["choices"]] for body in texts]
    assert said == [said[0]] * 4 and len(said[0]) == 2 and said[0][0] != said[0][1]


def test_several_prompts_keep_their_places(client):
    alone = [complete(client, prompt=p, **SETTINGS).json() for p in ("The quick", "What is")]
    both = complete(client, prompt=["The quick", "What is"], **SETTINGS).json()
    assert [c["index"] for c in both["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in both["choices"]] == [c["text"] for body in alone for c in body["choices"]]
    assert both["usage"]["prompt_tokens"] == sum(body["usage"]["prompt_tokens"] for body in alone)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stop", [None, ["e"]])
def test_the_stream_joins_to_the_whole_reply(client, echo, stop):
    fields = {**SETTINGS, "prompt": ["The quick", "What is"], "echo": echo, "stop": stop, "max_tokens": 12}
    whole = complete(client, **fields).json()
    parts = events(complete(client, stream=True, stream_options={"include_usage": True}, **fields))
    texts, reasons = [""] * 4, [None] * 4
    for part in parts:
        for choice in part["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert parts[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_streamed_offset_is_counted_on_and_not_anew(client, monkeypatch):
    """With a sum over all earlier tokens at every token, an answer of 131,072 tokens took the server minutes."""
    fields = {**SETTINGS, "prompt": ["The quick", "What is"], "logprobs": 1, "max_tokens": 12}
    whole = complete(client, **fields).json()
    monkeypatch.setattr(generation_module, "Sample", lambda *given: Sample(*given, tokens=OneAtATime()))
    offsets = [[], [], [], []]
    for part in events(complete(client, stream=True, **fields)):
        for choice in part["choices"]:
            offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert offsets == [choice["logprobs"]["text_offset"] for choice in whole["choices"]]


class OneAtATime(list):
    """Cannot be read but for single tokens."""

    def __iter__(self):
        raise AssertionError("all tokens are read")

    def __getitem__(self, key):
        assert isinstance(key, int)
        return super().__getitem__(key)


@pytest.mark.parametrize("most", [0, 3])
def test_echo_scores_the_prompt(client, most):
    ids = speaker_tokenizer().encode("The quick")
    body = complete(client, echo=True, logprobs=2, max_tokens=most, temperature=0, ignore_eos=True).json()
    choice = body["choices"][0]
    rows = choice["logprobs"]
    assert choice["text"].startswith("The quick") and (most > 0) == (choice["text"] != "The quick")
    assert len(rows["tokens"]) == len(ids) + most == len(rows["text_offset"]) == len(rows["top_logprobs"])
    assert rows["token_logprobs"][0] is None and "".join(rows["tokens"][: len(ids)]) == "The quick"
    engine = client.app.state.service.source
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    (output,) = engine.generate([ids], params)
    assert rows["token_logprobs"][1 : len(ids)] == pytest.approx([entry[1] for entry in output.prompt_logprobs[1:]])
    if most:
        assert rows["token_logprobs"][len(ids)] == max(rows["top_logprobs"][len(ids)].values())


def test_details_of_a_completion(client):
    body = complete(client, return_token_ids=True, prompt_logprobs=1, ignore_eos=True).json()
    ids = speaker_tokenizer().encode("The quick")
    choice = body["choices"][0]
    assert body["prompt_token_ids"] == choice["prompt_token_ids"] == ids
    assert len(choice["token_ids"]) == len(choice["weight_versions"]) == 6
    assert choice["prompt_logprobs"][0] is None and str(ids[1]) in choice["prompt_logprobs"][1]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"suffix": "x"}, "suffix is not supported"),
        ({"prompt": []}, "1 to 64 prompts"),
        ({"prompt": ["a"] * 65}, "1 to 64 prompts"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": ["a", ""]}, "The prompt is empty"),
        ({"prompt": [10**6]}, "no token id below"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"max_tokens": 0}, "or for echo"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"echo": True, "logprobs": 1, "stream": True}, "leave out stream"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_token": 1}, "Did you mean 'max_tokens'?"),
    ],
)
def test_bad_completions_have_a_sentence(client, fields, sentence):
    response = complete(client, **fields)
    assert response.status_code == 400 and sentence in response.json()["error"]["message"], response.text


def test_tokens_in_and_tokens_out(client):
    body = generate(client, sampling_params={"n": 2, "prompt_logprobs": 0}).json()
    assert body["prompt_token_ids"] == [40, 41, 42] and len(body["prompt_logprobs"]) == 3
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    engine = client.app.state.service.source
    (output,) = engine.generate([[40, 41, 42]], SamplingParams(max_tokens=6, ignore_eos=True, seed=3, n=2))
    for choice, own in zip(body["choices"], output.outputs, strict=True):
        assert choice["token_ids"] == list(own.token_ids)
        assert [row["logprob"] for row in choice["logprobs"]["content"]] == pytest.approx(list(own.logprobs))
        assert all(len(row["top_logprobs"]) == 2 for row in choice["logprobs"]["content"])
        assert choice["weight_versions"] == [0] * 6 and choice["finish_reason"] == "length"


def test_streamed_tokens_are_the_same(client):
    whole = generate(client, sampling_params={"n": 2}).json()
    parts = events(generate(client, sampling_params={"n": 2}, stream=True))
    assert parts[0]["prompt_token_ids"] == [40, 41, 42]
    for choice in whole["choices"]:
        mine = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert [token for c in mine for token in c["token_ids"]] == choice["token_ids"]
        assert [row for c in mine for row in c["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert [c["finish_reason"] for c in mine][-1] == choice["finish_reason"]


def test_a_special_token_is_generated_and_returned_as_it_is(client):
    end = speaker_tokenizer().token_to_id("<|user|>")
    bias = {"logit_bias": {str(end): 100}, "ignore_eos": False}
    (choice,) = generate(client, sampling_params=bias).json()["choices"]
    assert choice["token_ids"] == [end] and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "status", "sentence"),
    [
        ({"token_ids": []}, 400, "token_ids"),
        ({"token_ids": [-1]}, 400, "no token id below"),
        ({"sampling_params": {"max_token": 1}}, 400, "Did you mean 'max_tokens'?"),
        ({"sampling_params": {"n": 17}}, 400, "at most 16 samples"),
        ({"sampling_params": {"temperature": "hot"}}, 400, "temperature is 'hot'"),
        ({"sampling_params": {"structured_outputs": {"xml": 1}}}, 400, "structured_outputs must be"),
        ({"sampling_params": {"logit_bias": {"a": 1}}}, 400, "logit_bias"),
        ({"sampling_params": {"experts_from": 0}}, 400, "experts_from is for callers in the same program"),
        ({"model": "other"}, 404, "not served here"),
        ({"cache_salt": ""}, 400, "cache_salt"),
        ({"sampling_params": {"bad_words": [5]}}, 400, "bad_words must be a list of texts"),
        ({"sampling_params": {"bad_words": ["a"] * 65}}, 400, "bad_words holds at most 64 words"),
        ({"sampling_params": {"bad_words": ["abcdefgh " * 99]}}, 400, "bad_words holds at most 64 words of 64 tokens"),
        ({"sampling_params": {"bad_words": ["a"], "bad_sequences": 5}}, 400, "bad_sequences is 5; give a list"),
        ({"sampling_params": {"bad_words": ["a"], "bad_sequences": [5]}}, 400, "bad_sequences"),
        ({"sampling_params": {"bad_words": ["a"], "bad_sequences": [[5]] * 127}}, 400, "fewer beside bad_sequences"),
        ({"sampling_params": {"bad_words": ["a"], "bad_sequences": [[5]] * 129}}, 400, "bad_sequences holds at most"),
    ],
)
def test_bad_generate_requests_have_a_sentence(client, fields, status, sentence):
    response = generate(client, **fields)
    assert response.status_code == status and sentence in response.json()["error"]["message"], response.text
