"""Small documents for the tests of data and of its verb."""

from glm5.data import Source

PHRASE = "the lamp of a keeper stands beside seven grey stones and nobody counts rivers that turn north"
WORDS = PHRASE.split()


def sentences(count: int) -> list[tuple[str, str]]:
    """Distinct short documents of different lengths."""
    picks = [[WORDS[(i * (j + 3) + j * j) % len(WORDS)] for j in range(3 + i % 23)] for i in range(count)]
    return [(f"doc {i}", f"{i}: " + " ".join(words)) for i, words in enumerate(picks)]


def source(name: str = "toy", texts: list[tuple[str, str]] | None = None, package: str = "python") -> Source:
    return Source(name, package, "CC0-1.0", lambda: iter(sentences(300) if texts is None else texts))
