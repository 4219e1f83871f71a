"""The fields of vLLM's `extra_body`: built, neutral, or refused."""

import json

import pytest
from chat_client import ADD, USER, ask, client_of, prompts_of
from speaker import ScriptedModel, speaker_model, speaker_tokenizer

NEUTRAL = {"skip_special_tokens": True, "spaces_between_special_tokens": False, "add_generation_prompt": True,
           "continue_final_message": False, "bad_words": [], "return_tokens_as_token_ids": False, "echo": False,
           "allowed_token_ids": None, "include_reasoning": True, "use_beam_search": False, "length_penalty": 1.0,
           "request_id": "x", "cache_salt": "a tenant", "prompt_cache_options": {"mode": "explicit"},
           "temperature": 2.5}  # fmt: skip


def test_neutral_values_pass():
    assert ask(client_of("</think>ok"), **NEUTRAL).status_code == 200


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"allowed_token_ids": [5]}, "allowed_token_ids is not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens is not supported"),
        ({"moderation": {"model": "x"}}, "moderation is not supported"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"bad_words": ["x"] * 64}, "bad_words: List should have at most 63 items"),
        ({"stop_token_ids": [7] * 64}, "stop_token_ids: List should have at most 63 items"),
        ({"add_generation_prompt": False}, "set continue_final_message"),
        ({"continue_final_message": True}, "goes on from a last message of the assistant"),
        ({"continue_final_message": True, "response_format": {"type": "json_object"}}, "cannot begin"),
    ],
)
def test_what_is_not_built_has_a_sentence(fields, sentence):
    response = ask(client_of("ok"), **fields)
    assert response.status_code == 400 and sentence in response.json()["error"]["message"], response.text


@pytest.mark.parametrize("reasoning", [None, "12 and 30 <|user|>"])
def test_a_last_message_is_gone_on_from(reasoning):
    client = client_of(" is 42.")
    prompts = prompts_of(client)
    begun = {"role": "assistant", "content": "The answer", "reasoning_content": reasoning}
    fields = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    answer = ask(client, messages=[*USER, begun], **fields)
    assert answer.json()["choices"][0]["message"]["content"] == " is 42.", answer.text
    opening = "</think>" if reasoning is None else f"<think>{reasoning}</think>"
    assert prompts[0].endswith(f"<|assistant|>{opening}The answer")
    ids = answer.json()["prompt_token_ids"]
    assert ids.count(speaker_tokenizer().token_to_id("<|user|>")) == 1  # one that is spelled is text
    spaced = ask(client, messages=[*USER, {**begun, "content": "The answer "}], **fields)
    assert spaced.status_code == 400 and "ends in white space" in spaced.text


def test_what_goes_on_keeps_its_blank_lines():
    fields = {"continue_final_message": True, "messages": [*USER, {"role": "assistant", "content": "1. a"}]}
    answer = ask(client_of("\n2. b"), **fields).json()
    assert answer["choices"][0]["message"]["content"] == "\n2. b"
    lines = ask(client_of("\n2. b"), **fields, stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "\n2. b"
    fields["messages"][-1] = {"role": "assistant", "content": "", "reasoning_content": "hm"}  # nothing is begun
    assert ask(client_of("\n\n1. a"), **fields).json()["choices"][0]["message"]["content"] == "1. a"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/inference/v1/generate"])
def test_bad_words_are_not_written(path):
    said = []
    for bad in ([], ["answer"]):
        settings = {"bad_words": bad, "temperature": 0, "max_tokens": 12}
        given = {"messages": USER, **settings} if "chat" in path else {"prompt": "What", **settings}
        if "generate" in path:
            given = {"token_ids": speaker_tokenizer().encode("What"), "sampling_params": settings}
        answer = client_of(model=ScriptedModel("The answer is 42.")).post(path, json={"model": "tiny", **given})
        (choice,) = answer.json()["choices"]
        said.append(speaker_tokenizer().decode(choice["token_ids"]) if "generate" in path else str(choice))
    assert "answer" in said[0] and "answer" not in said[1]


def test_as_many_as_are_accepted_leave_room_for_what_the_server_adds():
    assert ask(client_of("</think>ok"), bad_words=["x"] * 63).status_code == 200
    one = {"tools": [ADD], "parallel_tool_calls": False}
    assert ask(client_of("</think>ok"), stop_token_ids=list(range(40, 103)), **one).status_code == 200


def cached(path, **fields):
    """How many tokens of the second of two equal prompts came from the cache, by whether their salts are equal."""
    counts = []
    for first, second in (("a", "a"), ("a", "b"), ("a//b", "a//c"), (None, "a")):
        client = client_of(model=speaker_model())
        for salt in (first, second):
            extra = {} if salt is None else {"cache_salt": salt}
            answer = client.post(path, json={"model": "tiny", **fields, **extra})
            assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        counts.append((usage.get("prompt_tokens_details") or usage["input_tokens_details"])["cached_tokens"])
    return counts


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 60}], "max_tokens": 2}),
        ("/v1/completions", {"prompt": "word " * 60, "max_tokens": 2}),
        ("/v1/responses", {"input": "word " * 60, "max_output_tokens": 2}),
        ("/inference/v1/generate", {"token_ids": [40, 41] * 60, "sampling_params": {"max_tokens": 2}}),
    ],
)
def test_only_requests_of_one_salt_share_cached_prefixes(path, fields):
    same, *others = cached(path, **fields)
    assert same > 0 and others == [0, 0, 0]


def test_tokens_are_named_by_their_ids():
    client = client_of(model=speaker_model())
    fields = {"return_tokens_as_token_ids": True, "return_token_ids": True, "max_tokens": 4, "ignore_eos": True}
    choice = ask(client, logprobs=True, top_logprobs=2, **fields).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert all(top["token"].startswith("token_id:") for entry in content for top in entry["top_logprobs"])
    body = {"model": "tiny", "prompt": "What", "logprobs": 2, **fields}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)


def test_a_prompt_that_is_only_scored_has_no_completion():
    body = {"model": "tiny", "prompt": "What is", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = client_of(model=speaker_model()).post("/v1/completions", json=body).json()
    usage = answer["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, usage["prompt_tokens"])


def test_no_stop_string_is_looked_for_in_the_first_min_tokens():
    words, early = "</think>one two three one two three four", speaker_tokenizer().encode("</think>one two three")
    for least, expected in ((0, "one two"), (len(early), "one two three one two")):
        answer = ask(client_of(words), stop=[" three"], min_tokens=least).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (expected, "stop")
