"""A corpus: documents from sources, exact duplicates removed, split by hash, with a manifest of where all came from.

On disk: `train.jsonl` and `heldout.jsonl`, one document a line (text, source, name, sha256), in the order of their
hashes, so that any first part is a fair sample; `manifest.json` with, per source, package, version, licence, documents,
bytes and the SHA-256 of its text. A document is held out by its own hash, so the split survives a change of the
sources. Left out: near duplicates, filters, mixing weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glm5.data.manifest import note_file, read_manifest
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


def build_corpus(directory: Path, sources: Sequence[Source] | None = None, *, heldout_per_thousand: int = 20) -> Corpus:
    """Reads `sources` (default: `installed_sources()`) and writes a corpus to `directory`, in place of an older one.

    A source whose package is not installed is noted in the manifest as skipped. Raises DataError when no text is left.
    """
    documents: dict[str, Document] = {}
    used: list[dict[str, Any]] = []
    skipped: list[str] = []
    for source in installed_sources() if sources is None else sources:
        version = source.version()
        if version is None:
            skipped.append(source.name)
            continue
        digest, count, size, repeated = hashlib.sha256(), 0, 0, 0
        for name, text in source.read():
            data = text.encode("utf-8", errors="replace")
            key = hashlib.sha256(data).hexdigest()
            if not text.strip() or key in documents:
                repeated += 1
                continue
            documents[key] = Document(data.decode(), source.name, name, key)
            digest.update(data)
            count, size = count + 1, size + len(data)
        used.append(
            {"name": source.name, "package": source.package, "version": version, "licence": source.licence,
             "documents": count, "bytes": size, "sha256": digest.hexdigest(), "empty_or_repeated": repeated}
        )  # fmt: skip
    ordered = [documents[key] for key in sorted(documents)]
    parts: dict[Split, list[Document]] = {
        "train": [d for d in ordered if not is_held_out(d.sha256, heldout_per_thousand)],
        "heldout": [d for d in ordered if is_held_out(d.sha256, heldout_per_thousand)],
    }
    for split, part in parts.items():
        if not part:
            raise DataError(f"the sources leave no {split} documents; add text or change heldout_per_thousand.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing_directory(directory) as beside:
        for split, part in parts.items():
            with replacing(beside / f"{split}.jsonl") as file:
                for document in part:
                    file.write((json.dumps(vars(document), ensure_ascii=False) + "\n").encode())
        manifest = {
            "kind": "corpus",
            "sources": used,
            "skipped_sources": skipped,
            "heldout_per_thousand": heldout_per_thousand,
            "splits": {
                split: {"documents": len(part), "bytes": sum(len(d.text.encode()) for d in part)}
                for split, part in parts.items()
            },
            "files": {f"{split}.jsonl": note_file(beside / f"{split}.jsonl") for split in parts},
        }
        write_json(beside / "manifest.json", manifest)
    return Corpus(directory, manifest)


def open_corpus(directory: Path) -> Corpus:
    """A corpus that was built before; raises DataError when a file is missing or does not match the manifest."""
    return Corpus(directory, read_manifest(directory, "corpus"))


def is_held_out(sha256: str, per_thousand: int) -> bool:
    """True for about `per_thousand` in a thousand documents, chosen by their hash."""
    return int(sha256[:12], 16) % 1000 < per_thousand
