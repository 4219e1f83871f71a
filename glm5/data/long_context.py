"""Long-context examples of any length: needles in real text, key-value recall, repeated text.

A *needle* is a short sentence that joins two words ("The secret words are Gilead letter."), hidden in filler text; a
question at the end says the first word and the answer is the second. With several needles all are asked, in another
order. *Key-value* rows are lists of such pairs without filler, *repeat* rows say one passage again and again: they
teach the same circuit (look up what followed last time) at many more positions a row.
After "needle in a haystack" (G. Kamradt, 2023) and RULER (arXiv 2404.06654).

Everything is a function of (seed, split, kind, length, index). The splits share no pair of words (a pair is held out by
the hash of its text) and no filler (it comes from the same split of the corpus). An example is exactly `length + 1`
tokens, so that it fills a row of `length` positions. Pieces are joined as tokens: the text that they stand for could be
cut otherwise by the tokenizer. Left out: questions in other words than the needle's, reasoning over several needles.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, get_args

from glm5.data.corpus import Split, is_held_out
from glm5.data.shards import TokenDataset, TokenDocument
from glm5.errors import ConfigError, DataError, did_you_mean
from glm5.text import Tokenizer

Kind = Literal["needle", "multi_needle", "key_value", "repeat"]
HELD_OUT_PER_THOUSAND = 200
"""Pairs of words that only held-out examples use."""
NEEDLE = "\nThe secret words are"
TOKENS_BETWEEN = 8
"""Filler for each of the most needles that a row may have."""
SHORTEST_LENGTH = 64
FEWEST_WORDS = 32
DEFAULT_WORDS = 128
"""Words of training rows and of evaluations: few, because a small model learns to copy word by word. What is asked is
new by its pair and its text."""


@dataclass(frozen=True)
class Example:
    """One row of text with questions whose answers stand earlier in it."""

    ids: list[int]
    answers: list[tuple[int, int]]
    """Positions [start, stop) of the answers' tokens in `ids`."""
    depths: list[float]
    """Per answer: where the pair stands, as a share of the row (0 is the beginning)."""

    def document(self, tokenizer: Tokenizer, *, learn: Literal["answers", "all"] = "answers") -> TokenDocument:
        """The example as training data; the loss counts its answers or every token."""
        size = len(tokenizer.decode(self.ids, skip_special_tokens=True).encode())
        if learn == "all":
            return TokenDocument(self.ids, size)
        mask = [False] * len(self.ids)
        for start, stop in self.answers:
            mask[start:stop] = [True] * (stop - start)
        return TokenDocument(self.ids, size, mask)


class LongContext:
    """Makes the examples of one split. `filler` is a dataset of the same split and the same tokenizer.

    The circuit that looks up forms sooner over few words, and spreads from frequent to rare ones. words: only the first
    so many (None: all); a larger number includes the words of a smaller one. zipf: the word of rank r (from 0) is drawn
    with weight 1 / (r + zipf); None: all alike. Repeated passages are real text only over all words alike.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        filler: TokenDataset,
        *,
        split: Split,
        seed: int = 0,
        words: int | None = DEFAULT_WORDS,
        zipf: float | None = None,
    ) -> None:
        self.tokenizer, self.filler, self.split, self.seed = tokenizer, filler, split, seed
        self.words = single_token_words(tokenizer)[:words]
        if len(self.words) < FEWEST_WORDS:
            raise DataError(f"{len(self.words)} words of one token are too few; take {FEWEST_WORDS} or more.")
        if zipf is not None and not zipf > 0:
            raise ConfigError(f"zipf is {zipf}; it must be above 0, or None for words that are all alike.")
        self.weights = [1.0 if zipf is None else 1 / (rank + zipf) for rank in range(len(self.words))]
        self.only_words = words is not None or zipf is not None
        self._splits: dict[tuple[int, int], Split] = {}
        self._needle = tokenizer.encode(NEEDLE)
        self._end = tokenizer.encode(".\n")
        self._line = tokenizer.encode("\n")

    # ---- kinds --------------------------------------------------------------------------------------------------
    def example(self, kind: Kind, length: int, index: int) -> Example:
        """Example `index` of a kind, `length + 1` tokens. Raises ConfigError for a length that is too short."""
        if length < SHORTEST_LENGTH:
            raise ConfigError(f"a long-context row of {length} tokens has no room; use at least {SHORTEST_LENGTH}.")
        if kind == "needle":
            return self.needles(length, index)
        if kind == "multi_needle":
            most = max(1, min(length // (2 * self._needle_size() + TOKENS_BETWEEN), len(self.words) // 3))
            return self.needles(length, index, needles=self._draw(kind, length, index).randint(1, most))
        if kind == "key_value":
            return self._key_values(length, index)
        if kind == "repeat":
            return self._repeat(length, index)
        raise ConfigError(f"long-context kind is {kind!r}; use one of {', '.join(get_args(Kind))}."
                          f"{did_you_mean(kind, get_args(Kind))}")  # fmt: skip

    def needles(self, length: int, index: int, *, needles: int = 1, depth: float | None = None) -> Example:
        """Pairs hidden in filler, all asked at the end. depth: of a single needle, 0 to 1; random when left out."""
        draw = self._draw("needle", length, index, needles, depth)
        size = self._needle_size()
        room = length - 2 * needles * size + len(self._end)
        if room < needles:
            raise ConfigError(f"{needles} needles do not fit into a row of {length} tokens; ask for fewer.")
        pairs = self._pairs(draw, needles)
        text = self._filler(draw, room, without={word for pair in pairs for word in pair})
        wanted = sorted(draw.random() for _ in range(needles)) if depth is None else [depth] * needles
        cuts = sorted(self._sentence_end(text, round(place * len(text))) for place in wanted)
        ids, places, done = [self.tokenizer.pad_id], [], 0
        for cut, (key, value) in zip(cuts, pairs, strict=True):
            ids += text[done:cut]
            places.append(len(ids))
            ids += [*self._needle, key, value, *self._end]
            done = cut
        ids += text[done:]
        answers, depths = [], []
        for number in draw.sample(range(needles), needles):
            key, value = pairs[number]
            ids += [*self._needle, key]
            answers.append((len(ids), len(ids) + 1))
            depths.append(places[number] / length)
            ids += [value, *self._end]
        ids = ids[: len(ids) - len(self._end)]
        return Example(ids, answers, depths)

    def _key_values(self, length: int, index: int) -> Example:
        """Lines of pairs, then the same lines in another order."""
        draw = self._draw("key_value", length, index)
        line = len(self._line) + 2
        count = min(length // (2 * line), len(self.words) // 3)
        pairs = self._pairs(draw, count)
        words = {word for pair in pairs for word in pair}
        ids = [self.tokenizer.pad_id, *self._filler(draw, length - 2 * line * count, without=words)]
        places, answers, depths = [], [], []
        for pair in pairs:
            ids += self._line
            places.append(len(ids))
            ids += pair
        for number in draw.sample(range(count), count):
            ids += [*self._line, pairs[number][0]]
            answers.append((len(ids), len(ids) + 1))
            depths.append(places[number] / length)
            ids.append(pairs[number][1])
        return Example(ids, answers, depths)

    def _repeat(self, length: int, index: int) -> Example:
        """A passage of real text, or of random words, until the row is full."""
        draw = self._draw("repeat", length, index)
        period = draw.randint(8, length // 2)
        real = not self.only_words and draw.random() < 0.5
        passage = self._filler(draw, period) if real else self._neighbours(draw, period)
        ids = [self.tokenizer.pad_id, *passage * (length // period + 1)][: length + 1]
        answers = [(at, at + 1) for at in range(period + 2, length + 1)]
        return Example(ids, answers, [(start - period) / length for start, _ in answers])

    # ---- sets ---------------------------------------------------------------------------------------------------
    def documents(
        self, count: int, length: int, kinds: Mapping[Kind, float], *, learn: Literal["answers", "all"] = "answers"
    ) -> Iterator[TokenDocument]:
        """`count` training documents; `kinds` maps each wanted kind to its weight. Load them with `keep_whole`."""
        if not kinds or min(kinds.values()) < 0 or sum(kinds.values()) <= 0:
            raise ConfigError("long-context data need at least one kind with a weight above 0.")
        names, weights = list(kinds), list(kinds.values())
        for index in range(count):
            kind = self._draw("kind", length, index).choices(names, weights)[0]
            yield self.example(kind, length, index).document(self.tokenizer, learn=learn)

    # ---- parts --------------------------------------------------------------------------------------------------
    def _needle_size(self) -> int:
        """Tokens of a needle, and of a question with its answer."""
        return len(self._needle) + 2 + len(self._end)

    def _draw(self, *what: object) -> random.Random:
        return random.Random(f"long context {self.seed} {self.split} {what}")

    def _pairs(self, draw: random.Random, count: int) -> list[tuple[int, int]]:
        """Pairs of the split, of distinct words."""
        # Weighted sampling without replacement (Efraimidis and Spirakis 2006): the largest log(u) / weight come first.
        keyed = [(math.log(1 - draw.random()) / w, word) for word, w in zip(self.words, self.weights, strict=True)]
        pool = [word for _, word in sorted(keyed, reverse=True)]
        pairs: list[tuple[int, int]] = []
        while pool and len(pairs) < count:
            key = pool.pop(0)
            value = next((word for word in pool if self._belongs(key, word)), None)
            if value is not None:
                pool.remove(value)
                pairs.append((key, value))
        if len(pairs) < count:
            raise DataError(f"{count} pairs of words do not fit into {len(self.words)} words; ask for fewer.")
        draw.shuffle(pairs)
        return pairs

    def _neighbours(self, draw: random.Random, count: int) -> list[int]:
        """Random words of which every two neighbours, the last and the first too, are a pair of the split."""
        for _ in range(100):
            words = draw.choices(self.words, self.weights)
            for _ in range(1000 * count):
                word = draw.choices(self.words, self.weights)[0]
                last = len(words) == count - 1
                if self._belongs(words[-1], word) and not (last and not self._belongs(word, words[0])):
                    words.append(word)
                if len(words) == count:
                    return words
        raise DataError(f"{count} words in pairs of the split do not fit into {len(self.words)} words; take more.")

    def _belongs(self, key: int, value: int) -> bool:
        """Whether the pair is of this split."""
        if (key, value) not in self._splits:
            self._splits[key, value] = split_of(self.tokenizer.decode([key]), self.tokenizer.decode([value]))
        return self._splits[key, value] == self.split

    def _filler(self, draw: random.Random, count: int, *, without: Set[int] = frozenset()) -> list[int]:
        """`count` tokens of running text from a random document on, without the marks between documents.

        It leaves out the words that are asked for, so that a question has one answer.
        """
        ids: list[int] = []
        left_out = {self.tokenizer.pad_id, *without}
        document = draw.randrange(len(self.filler))
        skip = draw.randrange(int(self.filler.lengths[document]))
        while len(ids) < count:
            more = self.filler.ids(document, skip, skip + count - len(ids) + 1).tolist()
            ids += [token for token in more if token not in left_out]
            skip += len(more)
            if skip >= int(self.filler.lengths[document]):
                document, skip = (document + 1) % len(self.filler), 0
        return ids[: max(count, 0)]

    def _sentence_end(self, text: Sequence[int], place: int) -> int:
        """The first place from `place` on where a sentence or line ends, within 64 tokens, else `place` itself."""
        for at in range(place, min(place + 64, len(text))):
            if self.tokenizer.decode([text[at]]).rstrip(" ")[-1:] in (".", "\n"):
                return at + 1
        return place


def split_of(key: str, value: str) -> Split:
    """Where a pair belongs."""
    digest = hashlib.sha256(f"{key}{value}".encode()).hexdigest()
    return "heldout" if is_held_out(digest, HELD_OUT_PER_THOUSAND) else "train"


def single_token_words(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are a whole word of at least three letters with the space before it, in the order of their hashes."""
    texts = {token: tokenizer.decode([token]) for token in range(tokenizer.vocab_size)}
    found = [token for token, text in texts.items()
             if re.fullmatch(r" [A-Za-z]{3,}", text) and tokenizer.encode(text) == [token]]  # fmt: skip
    return sorted(found, key=lambda token: hashlib.sha256(texts[token].encode()).hexdigest())
