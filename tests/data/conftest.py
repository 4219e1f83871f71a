"""A small corpus and tokenizer that every test of this room may use."""

import pytest
from toy_corpus import source

from glm5.data import build_corpus, tokenize_corpus
from glm5.text import Tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus") / "corpus", [source()], heldout_per_thousand=100)


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return Tokenizer.train(corpus.texts("train"), 512)


@pytest.fixture(scope="session")
def dataset(corpus, tokenizer, tmp_path_factory):
    return tokenize_corpus(corpus, "train", tokenizer, tmp_path_factory.mktemp("tokens") / "train")
