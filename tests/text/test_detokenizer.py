"""Streaming detokenisation: the pieces are the whole, and no piece holds half a character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests_text_data import awkward_text

from glm5.text import Detokenizer, Tokenizer, token_bytes


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = False) -> list[str]:
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(stream.feed(i) for i in ids), stream.finish()]


@given(awkward_text(), st.booleans())
def test_pieces_of_a_text(tokenizer: Tokenizer, text: str, skip: bool) -> None:
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids, skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 620), max_size=12), st.booleans())
def test_any_tokens_even_broken_ones(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🗼")
    assert len(ids) == 4
    assert streamed(tokenizer, ids) == ["", "", "", "🗼", ""]
    assert streamed(tokenizer, ids[:2]) == ["", "", "\ufffd"]


@given(awkward_text())
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(token_bytes(tokenizer, i) for i in tokenizer.encode(text)) == text.encode()
