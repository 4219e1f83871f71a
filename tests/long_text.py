"""A tokenizer with several hundred one-word tokens and datasets of both splits, for the tests of long contexts."""

from pathlib import Path

from glm5.data import Source, build_corpus, open_dataset, tokenize_corpus
from glm5.text import Tokenizer

SYLLABLES = ("ba", "ke", "lu", "mi", "no", "ra", "si", "to", "vu", "ze")


def texts() -> list[tuple[str, str]]:
    """Sentences of 700 invented words, each of which occurs many times."""
    words = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES[:7]]
    texts = []
    for i in range(60):
        sentences = (" ".join(words[(i * 37 + k * (i % 11 + 1)) % 700] for k in range(j, j + 9)) for j in range(40))
        texts.append((str(i), ". ".join(sentences)))
    return texts


def long_text(root: Path) -> Path:
    """Writes `tokenizer`, `train` and `heldout` below `root`."""
    source = Source("invented", "python", "CC0-1.0", lambda: iter(texts()))
    corpus = build_corpus(root / "corpus", [source], heldout_per_thousand=200)
    tokenizer = Tokenizer.train(corpus.texts("train"), 1400)
    tokenizer.save(root / "tokenizer")
    for split in ("train", "heldout"):
        tokenize_corpus(corpus, split, tokenizer, root / split)
    return root


def opened(root: Path, split: str):
    """(tokenizer, dataset of the split)."""
    tokenizer = Tokenizer.from_pretrained(root / "tokenizer")
    return tokenizer, open_dataset(root / split, tokenizer)
