"""The quickstart's text for other studies: corpus, a tokenizer of 4,096 tokens, train and held-out data sets."""

from __future__ import annotations

from pathlib import Path

from glm5.data import TokenDataset, build_corpus, open_corpus, open_dataset, tokenize_corpus
from glm5.text import Tokenizer

VOCABULARY = 4096


def quickstart_text(work: Path) -> tuple[TokenDataset, TokenDataset]:
    """(train, held-out); made under `work` on the first call: `corpus`, `tokenizer`, `train`, `heldout`."""
    corpus = open_corpus(work / "corpus") if (work / "corpus").exists() else build_corpus(work / "corpus")
    if not (work / "tokenizer" / "chat_template.jinja").exists():  # the last file that `save` writes
        Tokenizer.train(corpus.texts("train"), vocab_size=VOCABULARY).save(work / "tokenizer")
    tokenizer = Tokenizer.from_pretrained(work / "tokenizer")
    train, heldout = work / "train", work / "heldout"
    return (
        open_dataset(train, tokenizer) if train.exists() else tokenize_corpus(corpus, "train", tokenizer, train),
        open_dataset(heldout, tokenizer)
        if heldout.exists()
        else tokenize_corpus(corpus, "heldout", tokenizer, heldout),
    )
