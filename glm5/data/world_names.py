"""Pronounceable names that nobody bears, drawn from syllables.

A name begins with a consonant, ends as its kind does, and has at least six letters. A drawer gives no name twice, none
that is part of another and none of the words that it was told to avoid. Given names come from a small pool of their
own: several people share one, so only the family name tells them apart.
"""

from __future__ import annotations

import random
from collections.abc import Collection

STARTS = ("b", "br", "d", "dr", "f", "g", "gl", "h", "j", "k", "kr", "l", "m", "n", "p", "pl", "r", "s", "sk", "t",
          "tr", "v", "y", "z")  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
MIDDLES = ("b", "d", "f", "g", "k", "l", "lm", "lv", "m", "n", "nd", "p", "r", "rk", "rv", "s", "t", "v", "x", "z")
ENDS: dict[str, tuple[str, ...]] = {
    "country": ("avia", "onia", "estan", "oria", "undia"),
    "town": ("burg", "holm", "wick", "ford", "mar", "grad"),
    "person": ("ek", "ino", "ard", "os", "ula", "ett"),
    "company": ("ex", "ico", "ant", "orp", "ium"),
    "mineral": ("ite", "lith", "ane", "spar"),
    "currency": ("ar", "in", "el", "ong"),
}
GIVEN_NAMES = ("Alvo", "Berta", "Cilla", "Dorin", "Elka", "Fenn", "Gilda", "Henno", "Ilsa", "Jorun", "Kasper", "Lioba",
               "Mirko", "Nelda", "Oskar", "Petra", "Quint", "Runa", "Selma", "Tilo", "Ursel", "Vigo", "Wanda",
               "Yorick")  # fmt: skip


class NameDrawer:
    """Draws names; the same seed gives the same names."""

    def __init__(self, seed: str, avoid: Collection[str] = ()) -> None:
        self._draw = random.Random(f"names {seed}")
        self._taken = {word.casefold() for word in avoid}
        self._given: set[str] = set()

    def name(self, kind: str) -> str:
        """A new name of one word with a capital letter; currencies and minerals are lower case."""
        while True:
            stem = self._draw.choice(STARTS) + self._draw.choice(VOWELS) + self._draw.choice(MIDDLES)
            if self._draw.random() < 0.2:
                stem += self._draw.choice(VOWELS) + self._draw.choice(MIDDLES)
            word = stem + self._draw.choice(ENDS[kind])
            if len(word) < 6 or word in self._taken or any(word in other or other in word for other in self._given):
                continue
            self._given.add(word)
            return word if kind in ("mineral", "currency") else word.capitalize()

    def person(self) -> str:
        """A given name and a new family name."""
        return f"{self._draw.choice(GIVEN_NAMES)} {self.name('person')}"
