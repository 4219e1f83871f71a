"""Small held-out datasets that tell of somebody."""

from speaker import speaker_tokenizer

from glm5.data import Source, build_corpus, tokenize_corpus


def text_of(root, who):
    """A dataset called `heldout`, below `root`."""
    texts = [(str(i), f"The answer to {i} is {i * 7 % 13}, said the {who}.") for i in range(40)]
    corpus = build_corpus(
        root / "corpus", [Source("toy", "python", "CC0-1.0", lambda: iter(texts))], heldout_per_thousand=200
    )
    return tokenize_corpus(corpus, "heldout", speaker_tokenizer(), root / "heldout")
