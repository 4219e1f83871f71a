"""A small tokenizer, trained once for all the tests of this room."""

from __future__ import annotations

import pytest

from glm5.text import Tokenizer

CORPUS = [
    "The capital of France is Paris, and the capital of Japan is Tokyo (東京). " * 8,
    "def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5\n" * 8,
    "Привет, мир! 12345 678 90, naïve café; 你好，世界。" * 8,
    '{"city": "Paris", "days": 3, "units": null, "tags": ["a", "b"]}\n' * 8,
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=600)


@pytest.fixture(scope="session")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return str(directory)
