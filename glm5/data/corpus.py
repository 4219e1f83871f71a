"""A corpus: documents from sources, prepared, without duplicates, split by hash, with a manifest of their origin.

On disk: `train.jsonl` and `heldout.jsonl`, one document a line, in the order of their hashes, so that any first part is
a fair sample; `manifest.json` with, per source, package, version, licence, documents, bytes, the SHA-256 of its text,
and what was dropped for which reason. A document is held out by the hash of what it was read from, so the split
survives a change of the sources and of their preparation. Documents go to the disk as they are read: memory holds some
hundred bytes of each, whatever its length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from glm5.data.manifest import note_file, read_manifest, room_on_disk
from glm5.data.preparation import Preparation, Sieve, Tally
from glm5.data.raw import Broken, Raw
from glm5.data.sources import Source, installed_sources
from glm5.errors import DataError
from glm5.files import replacing, replacing_directory, sha256_of, write_json

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass(frozen=True)
class Document:
    """One text and its origin."""

    text: str
    source: str
    name: str
    sha256: str
    """Of the UTF-8 text."""
    origin_sha256: str = ""
    """Of the bytes that the text was read from, before anything was done to it."""
    licence: str = ""


@dataclass(frozen=True)
class Corpus:
    """A finished corpus on disk; open one with `open_corpus`."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds the hash of every file."""
        return sha256_of(self.directory / "manifest.json")

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, in the order of their hashes."""
        with open(self.directory / f"{split}.jsonl", encoding="utf-8") as file:
            for line in file:
                yield Document(**json.loads(line))

    def texts(self, split: Split) -> Iterator[str]:
        """The texts of a split, in the same order."""
        return (document.text for document in self.documents(split))

    def sample(self, split: Split, size: int) -> Iterator[str]:
        """The first texts of a split until they have `size` bytes: a fair sample, because hashes decide the order."""
        for text in self.texts(split):
            yield text
            size -= len(text.encode())
            if size <= 0:
                return


Progress = Callable[[str, int, int | None], None]
"""Told (what is being done, how much of it is done, of how much or None)."""


def build_corpus(
    directory: Path,
    sources: Sequence[Source] | None = None,
    *,
    heldout_per_thousand: int = 20,
    preparation: Preparation = Preparation(),
    progress: Progress = lambda what, done, total: None,
) -> Corpus:
    """Reads `sources` (default: `installed_sources()`) and writes a corpus to `directory`, in place of an older one.

    A source whose package is not installed is noted in the manifest as skipped. Raises DataError for a source without
    documents, for what cannot be read (unless `preparation.skip_broken`), and when no text is left.
    """
    sources = installed_sources() if sources is None else sources
    sieve = Sieve(preparation)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with room_on_disk(directory), replacing_directory(directory) as beside:
        kept: list[_Kept] = []
        used, skipped = [], []
        spool = beside / "spool.jsonl"
        with open(spool, "wb") as file:
            for source in sources:
                if source.version() is None:
                    skipped.append(source.name)
                else:
                    used.append(read_source(source, sieve, file, kept, progress))
        kept.sort(key=lambda document: document.sha256)
        parts: dict[Split, list[_Kept]] = {split: [] for split in SPLITS}
        for document in kept:
            parts["heldout" if is_held_out(document.origin_sha256, heldout_per_thousand) else "train"].append(document)
        for split, part in parts.items():
            if not part:
                raise DataError(
                    f"the sources leave no {split} documents{dropped_sentence(used)}; "
                    "add text or change heldout_per_thousand."
                )
            with open(spool, "rb") as lines, replacing(beside / f"{split}.jsonl") as file:
                for document in part:
                    lines.seek(document.start)
                    file.write(lines.read(document.line_bytes))
        spool.unlink()
        manifest = {
            "kind": "corpus",
            "sources": used,
            "skipped_sources": skipped,
            "heldout_per_thousand": heldout_per_thousand,
            "preparation": {**asdict(preparation), "languages": list(preparation.languages)},
            "libraries": sieve.libraries(),
            "splits": {
                split: {"documents": len(part), "bytes": sum(document.text_bytes for document in part)}
                for split, part in parts.items()
            },
            "files": {f"{split}.jsonl": note_file(beside / f"{split}.jsonl") for split in parts},
        }
        write_json(beside / "manifest.json", manifest)
    return Corpus(directory, manifest)


class _Kept(NamedTuple):
    """Where a document lies in the spool, and what decides its place."""

    sha256: str
    origin_sha256: str
    start: int
    line_bytes: int
    text_bytes: int


def read_source(source: Source, sieve: Sieve, spool: BinaryIO, kept: list[_Kept], progress: Progress) -> dict[str, Any]:
    """Appends what stays of one source to `spool` and `kept`; gives its entry in the manifest."""
    tally = Tally()
    for item in source.read():
        if isinstance(item, Broken):
            if not sieve.preparation.skip_broken:
                raise DataError(f"source {source.name}: {item.sentence} Or count such things and go on: skip_broken.")
            tally.drop("broken", item.name)
            continue
        raw = item if isinstance(item, Raw) else Raw(*item)
        for found in sieve.documents(raw, tally, filtered=source.filtered):
            data = found.text.encode()
            licence = raw.licence or source.licence
            document = Document(found.text, source.name, found.name, found.sha256, found.origin_sha256, licence)
            line = (json.dumps(vars(document), ensure_ascii=False) + "\n").encode()
            kept.append(_Kept(found.sha256, found.origin_sha256, spool.tell(), len(line), len(data)))
            spool.write(line)
            tally.keep(data)
        progress(f"reading {source.name}", tally.read, None)
    if not tally.read and not tally.dropped:
        raise DataError(f"source {source.name} is empty: it gives no documents; check its path or leave it out.")
    return {
        "name": source.name, "package": source.package, "version": source.version(), "licence": source.licence,
        "read": tally.read, "cut": tally.cut, "documents": tally.kept, "bytes": tally.size,
        "sha256": tally.digest.hexdigest(), "dropped": tally.dropped,
    }  # fmt: skip


def dropped_sentence(used: Sequence[dict[str, Any]]) -> str:
    """What was dropped in all, for an error."""
    reasons: dict[str, int] = {}
    for source in used:
        for reason, entry in source["dropped"].items():
            reasons[reason] = reasons.get(reason, 0) + entry["documents"]
    return " (dropped: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items()) + ")" if reasons else ""


def open_corpus(directory: Path) -> Corpus:
    """A corpus that was built before; raises DataError when a file is missing or does not match the manifest."""
    return Corpus(directory, read_manifest(directory, "corpus", needs=("sources", "splits")))


def is_held_out(sha256: str, per_thousand: int) -> bool:
    """True for about `per_thousand` in a thousand documents, chosen by their hash."""
    return int(sha256[:12], 16) % 1000 < per_thousand
