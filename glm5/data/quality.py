"""Quality filters: cheap counts that tell running text from debris.

The heuristics and most limits are Gopher's (Rae et al. 2021, table A1: length, mean word length, symbols, bullets,
ellipses, alphabetic words, stop words, repetition); the share of digits, and the page without a sentence, come from the
tradition of C4 (Raffel et al. 2020). They were made for English web pages: code and tables fail some of them, so give
such sources no filter. Left out: classifiers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The limits of --quality."""

    min_words: int = 50
    """A document has at least so many words."""
    max_words: int = 100_000
    """And at most so many."""
    min_mean_word_length: float = 3.0
    """Letters of a mean word, at least."""
    max_mean_word_length: float = 10.0
    """Letters of a mean word, at most."""
    max_symbols: float = 0.1
    """`#` and ellipses per word."""
    max_bullet_lines: float = 0.9
    """Share of lines that begin with a bullet."""
    max_ellipsis_lines: float = 0.3
    """Share of lines that end in an ellipsis."""
    min_alphabetic_words: float = 0.8
    """Share of words with a letter."""
    min_stop_words: int = 2
    """Different ones of: the be to of and that have with. 0 for text that is not English."""
    max_digits: float = 0.2
    """Share of digits among the characters that are not white space."""
    max_repeated_lines: float = 0.3
    """Share of lines that came before."""
    max_repeated_line_characters: float = 0.2
    """Characters in repeated lines, as a share of all."""
    max_repeated_4grams: float = 0.16
    """Share of the words that stand in the most frequent sequence of four words, if it comes at least twice."""

    def reason(self, text: str) -> str | None:
        """The first limit that the text breaks, by the name that the manifest uses; None when it breaks none."""
        words = text.split()
        if len(words) < self.min_words:
            return "too_few_words"
        if len(words) > self.max_words:
            return "too_many_words"
        if not self.min_mean_word_length <= sum(map(len, words)) / len(words) <= self.max_mean_word_length:
            return "mean_word_length"
        if (text.count("#") + text.count("...") + text.count("\u2026")) / len(words) > self.max_symbols:
            return "symbols"
        if sum(any(map(str.isalpha, word)) for word in words) / len(words) < self.min_alphabetic_words:
            return "alphabetic_words"
        if sum(map(str.isdigit, text)) / sum(map(len, words)) > self.max_digits:
            return "digits"
        if len(STOP_WORDS.intersection(map(str.lower, words))) < self.min_stop_words:
            return "stop_words"
        return self.reason_of_lines(text) or self.reason_of_repetition(words)

    def reason_of_lines(self, text: str) -> str | None:
        """The limits that look at lines."""
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if sum(line.startswith(("-", "*", "\u2022")) for line in lines) > self.max_bullet_lines * len(lines):
            return "bullet_lines"
        if sum(line.endswith(("...", "\u2026")) for line in lines) > self.max_ellipsis_lines * len(lines):
            return "ellipsis_lines"
        repeats = {line: count - 1 for line, count in Counter(lines).items()}
        if sum(repeats.values()) > self.max_repeated_lines * len(lines):
            return "repeated_lines"
        again = sum(len(line) * count for line, count in repeats.items())
        return "repeated_lines" if again > self.max_repeated_line_characters * sum(map(len, lines)) else None

    def reason_of_repetition(self, words: list[str]) -> str | None:
        """The limit on the most frequent sequence of four words."""
        counts = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        most = max(counts.values(), default=0)
        return "repeated_4grams" if most > 1 and 4 * most > self.max_repeated_4grams * len(words) else None
