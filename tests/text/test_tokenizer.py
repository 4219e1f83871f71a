"""The tokenizer: fixed special identities, exact round trips, and the same answers as `transformers`."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_text_data import awkward_text
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glm5.config import ModelConfig
from glm5.errors import TextError
from glm5.text import CONTROL_TOKENS, SPECIAL_TOKENS, Tokenizer
from glm5.text.specials import PUBLISHED_OFFSET

# Identities that are confirmed for the published models (vLLM's tests, model configurations).
PUBLISHED = {
    "<|endoftext|>": 154820, "[gMASK]": 154822, "<sop>": 154824, "<|system|>": 154826, "<|user|>": 154827,
    "<|assistant|>": 154828, "<|observation|>": 154829, "<think>": 154841, "</think>": 154842, "<tool_call>": 154843,
    "</tool_call>": 154844, "<arg_key>": 154847, "</arg_key>": 154848, "<arg_value>": 154849, "</arg_value>": 154850,
    "<|image|>": 154854, "<|video|>": 154855,
}  # fmt: skip


def test_special_tokens_are_the_published_ones_shifted(tokenizer: Tokenizer) -> None:
    for token, published in PUBLISHED.items():
        assert tokenizer.token_to_id(token) == published - PUBLISHED_OFFSET
        assert tokenizer.encode(token) == [published - PUBLISHED_OFFSET]
    assert list(tokenizer.special_ids) == list(SPECIAL_TOKENS)
    assert tokenizer.eos_ids == (0, 7, 9) and tokenizer.pad_id == 0


@pytest.mark.parametrize("preset", ["nano", "micro", "mini"])
def test_small_presets_name_the_real_identities(tokenizer: Tokenizer, preset: str) -> None:
    config = ModelConfig.from_preset(preset)
    assert tuple(config.eos_token_id) == tokenizer.eos_ids and config.pad_token_id == tokenizer.pad_id


def test_training_is_deterministic_and_fills_the_vocabulary() -> None:
    texts = [" ".join(f"{a}{b}" for b in ("ing", "ed", "er", "s")) for a in ("walk", "talk", "jump", "paint")] * 5
    first, second = (Tokenizer.train(texts, vocab_size=310) for _ in range(2))
    assert first.vocab_size == 310 and first.backend.to_str() == second.backend.to_str()


def test_training_refuses_a_vocabulary_without_room_for_bytes() -> None:
    with pytest.raises(TextError, match="need 292"):
        Tokenizer.train(["text"], vocab_size=291)


def test_numbers_are_cut_into_three_digits(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("12345678")
    assert [piece for piece, _ in pieces] == ["123", "456", "78"]


@given(awkward_text())
def test_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text


@given(awkward_text())
def test_no_text_becomes_special_when_not_allowed(tokenizer: Tokenizer, text: str) -> None:
    specials = set(tokenizer.special_ids.values())
    assert specials.isdisjoint(tokenizer.encode(text, allow_special=False))


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    texts = ["Paris", "", "a <|user|> b", "東京"]
    for allow in (True, False):
        assert tokenizer.encode_batch(texts, allow) == [tokenizer.encode(text, allow) for text in texts]


def test_half_of_a_surrogate_pair_gives_a_sentence(tokenizer: Tokenizer) -> None:
    text = b"ab\xff".decode(errors="surrogateescape")
    conversation = [{"role": "user", "content": text}]
    for encode in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode(text, allow_special=False),
        lambda: tokenizer.encode_batch(["ok", text]),
        lambda: tokenizer.apply_chat_template(conversation),
        lambda: tokenizer.apply_chat_template(conversation, escape_special=True),
    ):
        with pytest.raises(TextError, match=r"is '\\udcff', half of a surrogate pair"):
            encode()
    with pytest.raises(TextError, match="is of type int"):
        tokenizer.encode_batch(["ok", 5])


def test_skipping_drops_control_tokens_and_keeps_the_tags(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|assistant|><think>a</think>b<tool_call>f</tool_call><|user|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>b<tool_call>f</tool_call>"


def test_identities_beyond_the_vocabulary_are_silent(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("Paris"), 1_000_000]) == "Paris"


def test_transformers_loads_the_saved_directory(tokenizer: Tokenizer, saved: str) -> None:
    theirs = AutoTokenizer.from_pretrained(saved)
    assert isinstance(theirs, PreTrainedTokenizerFast)
    assert theirs.eos_token_id == 0 and theirs.pad_token_id == 0 and theirs.padding_side == "left"
    assert theirs.chat_template == tokenizer.chat_template
    assert set(CONTROL_TOKENS) == set(theirs.all_special_tokens)
    for text in ["The capital of France", " naïve 東京 <|user|>hi</think>", "1234567\r\n\n  x", ""]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    ids = tokenizer.encode("<|assistant|><think>a</think>Paris<|user|>")
    for skip in (True, False):
        assert theirs.decode(ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100)
@given(text=awkward_text())
def test_transformers_encodes_alike(tokenizer: Tokenizer, saved: str, text: str) -> None:
    theirs = _transformers(saved)
    assert theirs.encode(text) == tokenizer.encode(text)


_LOADED: dict[str, PreTrainedTokenizerFast] = {}


def _transformers(directory: str) -> PreTrainedTokenizerFast:
    if directory not in _LOADED:
        _LOADED[directory] = AutoTokenizer.from_pretrained(directory)
    return _LOADED[directory]


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, saved: str, tmp_path: Path) -> None:
    loaded = Tokenizer.from_pretrained(saved)
    loaded.save(tmp_path)
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (Path(saved) / name).read_bytes()
    assert pickle.loads(pickle.dumps(loaded)).encode("Paris 東京") == tokenizer.encode("Paris 東京")


def test_the_published_layout_loads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Special tokens behind the vocabulary, some named templates, other configuration fields."""
    state = json.loads(tokenizer.backend.to_str())
    plain = [t for t in sorted(state["model"]["vocab"], key=state["model"]["vocab"].get) if t not in SPECIAL_TOKENS]
    state["model"]["vocab"] = {token: i for i, token in enumerate(plain)}
    for i, token in enumerate(state["added_tokens"]):
        token["id"] = len(plain) + i
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    config = {"chat_template": templates, "model_max_length": 7, "tokenizer_class": "TokenizersBackend"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.token_to_id("<|user|>") == len(plain) + 7 and loaded.config["model_max_length"] == 7
    assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    text = "Paris <|user|> x"
    for allow in (True, False):
        shift = [i - 36 if i >= 36 else i + len(plain) for i in tokenizer.encode(text, allow)]
        assert loaded.encode(text, allow) == shift


def _without_role(state: dict) -> None:
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<|user|>"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no tokenizer.json in .*; give a directory"),
        ("{", "tokenizer.json is not a readable tokenizer"),
        ('{"model": 3}', "tokenizer.json is not a readable tokenizer"),
        ("no user", "tokenizer.json: this is not a tokenizer of GLM-5: it has no special token '<|user|>'"),
    ],
)
def test_a_bad_directory_gives_a_sentence(tokenizer: Tokenizer, tmp_path: Path, content: str, sentence: str) -> None:
    if content == "no user":
        state = json.loads(tokenizer.backend.to_str())
        _without_role(state)
        content = json.dumps(state)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TextError, match=sentence.replace("|", r"\|")):
        Tokenizer.from_pretrained(tmp_path)


def test_a_bad_configuration_file_gives_a_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for broken in ("[1]", "[]", "null", "{"):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(TextError, match=r"tokenizer_config.json is not a JSON object"):
            Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tokenizer: Tokenizer) -> None:
    state = json.loads(tokenizer.backend.to_str())
    with pytest.raises(TextError, match="not byte-level"):
        Tokenizer(tokenizers.Tokenizer.from_str(json.dumps({**state, "decoder": None})))


def test_an_unknown_token_names_the_nearest(tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError, match=r"Did you mean '<\|assistant\|>'"):
        tokenizer.token_to_id("<|asistant|>")


@given(st.integers(0, 599))
def test_every_identity_has_a_token(tokenizer: Tokenizer, token_id: int) -> None:
    if token_id < tokenizer.vocab_size:
        assert tokenizer.token_to_id(tokenizer.backend.id_to_token(token_id)) == token_id


def test_digits_of_their_own(tmp_path: Path) -> None:
    single = Tokenizer.train(["1234 1234 1234 12 12"], 400, digits=1)
    assert [single.decode([i]) for i in single.encode("x1234")] == ["x", "1", "2", "3", "4"]
    single.save(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).encode("1234") == single.encode("1234")
    with pytest.raises(TextError, match="digits is 0"):
        Tokenizer.train(["x"], 400, digits=0)
