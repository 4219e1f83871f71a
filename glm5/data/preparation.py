"""What happens to a document between its source and the corpus: cut, clean, filter, deduplicate, in this order.

Every document that is dropped is counted under one reason, with the first few names. Exact duplicates are found by the
SHA-256 of the text without case and with single spaces; the first document of its kind, in the order of the sources,
stays.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from glm5.data.cleaning import clean, unreadable
from glm5.data.language import LanguageFilter
from glm5.data.near_duplicates import NearDuplicates
from glm5.data.quality import Quality
from glm5.data.raw import Raw, cut_text
from glm5.errors import DataError

EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to documents. The defaults keep all text that is text, once."""

    clean: bool = True
    """One form of white space and Unicode (see `glm5.data.cleaning`)."""
    boilerplate: bool = False
    """Take out lines that web pages repeat."""
    longest: int = 1_000_000
    """Characters; longer documents are cut at the ends of paragraphs."""
    near_duplicates: float | None = None
    """Drop documents that are so similar to an earlier one (0.8: four fifths of their sequences of words)."""
    languages: tuple[str, ...] = ()
    """Drop documents that are surely in none of these languages (ISO 639-1 codes)."""
    quality: bool = False
    """Drop documents outside the limits, which were made for English prose."""
    limits: Quality = field(default_factory=Quality)
    skip_broken: bool = False
    """Count files and lines that cannot be read, in place of stopping at the first."""

    def __post_init__(self) -> None:
        if self.longest < 1000:
            raise DataError(f"documents of at most {self.longest} characters are too short; give 1,000 or more.")


@dataclass
class Tally:
    """What became of the documents of one source."""

    read: int = 0
    """Documents of the source; some may have been cut into several."""
    cut: int = 0
    kept: int = 0
    size: int = 0
    """Bytes of UTF-8 that were kept."""
    digest: Any = field(default_factory=hashlib.sha256)
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        """Counts one dropped document."""
        entry = self.dropped.setdefault(reason, {"documents": 0, "examples": []})
        entry["documents"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(name)

    def keep(self, data: bytes) -> None:
        """Counts one kept document."""
        self.kept += 1
        self.size += len(data)
        self.digest.update(data)


@dataclass(frozen=True)
class Prepared:
    """A document that stays."""

    name: str
    text: str
    sha256: str
    origin_sha256: str
    """Decides the split, so that parts of one document stay together and no setting moves a document."""


class Sieve:
    """Lets through what stays, of all sources one after another."""

    def __init__(self, preparation: Preparation) -> None:
        self.preparation = preparation
        self.seen: set[bytes] = set()
        near, languages = preparation.near_duplicates, preparation.languages
        self.near = NearDuplicates(near) if near is not None else None
        self.language = LanguageFilter(languages) if languages else None

    def libraries(self) -> dict[str, str]:
        """Versions of what else decides which documents stay."""
        used = {"rensa": self.near, "py3langid": self.language}
        return {name: importlib.metadata.version(name) for name, part in used.items() if part is not None}

    def documents(self, raw: Raw, tally: Tally, *, filtered: bool) -> Iterator[Prepared]:
        """What stays of one document, part by part."""
        tally.read += 1
        parts = cut_text(raw.text, self.preparation.longest)
        first, second = next(parts, ""), next(parts, None)
        if second is None:
            found = self.judge(raw.name, first, tally, filtered)
            if found is not None:
                yield Prepared(raw.name, found, sha256_of_text(found), raw.sha256 or sha256_of_text(first))
            return
        tally.cut += 1
        origin = raw.sha256 or sha256_of_text(raw.text if isinstance(raw.text, str) else raw.name)
        for number, part in enumerate((p for group in ([first, second], parts) for p in group), 1):
            name = f"{raw.name} part {number}"
            found = self.judge(name, part, tally, filtered)
            if found is not None:
                yield Prepared(name, found, sha256_of_text(found), origin)

    def judge(self, name: str, text: str, tally: Tally, filtered: bool) -> str | None:
        """The cleaned text, or None after the drop was counted."""
        preparation = self.preparation
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written
        reason = unreadable(text)
        if reason is None and preparation.clean:
            text = clean(text, boilerplate=preparation.boilerplate)
            reason = "empty" if not text.strip() else None
        if reason is None and filtered and preparation.quality:
            reason = preparation.limits.reason(text)
        if reason is None and filtered and self.language is not None:
            other = self.language.other(text)
            if other is not None:
                reason, name = "language", f"{name} ({other})"
        if reason is None:
            key = hashlib.sha256(" ".join(text.split()).casefold().encode()).digest()
            if key in self.seen:
                reason = "duplicate"
            self.seen.add(key)
        if reason is None and self.near is not None:
            earlier = self.near.earlier(text, name)
            if earlier is not None:
                reason, name = "near_duplicate", f"{name} (like {earlier})"
        if reason is not None:
            tally.drop(reason, name)
            return None
        return text


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
