"""Tokenised documents on disk: flat arrays that are memory-mapped, and a manifest with their hashes.

A dataset directory holds, per shard, the token ids of its documents one after another (`*.tokens.npy`, uint16 where the
vocabulary allows), where each document starts (`*.starts.npy`), how many bytes of text it stands for (`*.bytes.npy`)
and, for chat data, which tokens are to be learned (`*.learn.npy`). Token arrays are plain `.npy` files, so NumPy alone
reads them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm5.data.corpus import Corpus, Document, Progress, Split
from glm5.data.manifest import note_file, read_manifest, room_on_disk
from glm5.errors import DataError
from glm5.files import replacing, replacing_directory, sha256_of, write_json
from glm5.text import Tokenizer

SHARD_TOKENS = 1 << 26
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class TokenDocument:
    """One document as token ids, the end mark included."""

    ids: list[int]
    byte_count: int
    """Bytes of UTF-8 text that the ids stand for, special tokens not counted."""
    learn: list[bool] | None = None
    """Whether each token is a target of the loss; None means all."""


@dataclass
class _Shard:
    ids: array[int] = field(default_factory=lambda: array("I"))  # 4 bytes a token; a list would take 8 and an object
    learn: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=lambda: [0])
    byte_counts: list[int] = field(default_factory=list)


class TokenDataset:
    """Tokenised documents, read through memory maps. `lengths` and `byte_counts` have one entry per document."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._tokens: list[NDArray[Any]] = []
        self._learn: list[NDArray[np.bool_] | None] = []
        starts, shard_of, byte_counts, lengths = [], [], [], []
        for index, name in enumerate(manifest["shards"]):
            self._tokens.append(np.load(directory / f"{name}.tokens.npy", mmap_mode="r"))
            masked = f"{name}.learn.npy" in manifest["files"]
            self._learn.append(np.load(directory / f"{name}.learn.npy", mmap_mode="r") if masked else None)
            edges = np.load(directory / f"{name}.starts.npy")
            starts.append(edges[:-1])
            lengths.append(np.diff(edges))
            byte_counts.append(np.load(directory / f"{name}.bytes.npy"))
            shard_of.append(np.full(len(edges) - 1, index))
        self._starts = np.concatenate(starts)
        self._shard_of = np.concatenate(shard_of)
        self.lengths: NDArray[np.int64] = np.concatenate(lengths)
        self.byte_counts: NDArray[np.int64] = np.concatenate(byte_counts)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds the hash of every file."""
        return sha256_of(self.directory / "manifest.json")

    @property
    def masked(self) -> bool:
        """Whether some tokens are not to be learned."""
        return any(mask is not None for mask in self._learn)

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Token ids `start` to `stop` of a document."""
        return self._slice(self._tokens[self._shard_of[document]], document, start, stop).astype(np.int64)

    def learn(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """Which of the same tokens the loss may use as targets."""
        mask = self._learn[self._shard_of[document]]
        if mask is None:
            return np.ones(len(range(*slice(start, stop).indices(int(self.lengths[document])))), dtype=bool)
        return np.asarray(self._slice(mask, document, start, stop))

    def _slice(self, values: NDArray[Any], document: int, start: int, stop: int | None) -> NDArray[Any]:
        base, length = int(self._starts[document]), int(self.lengths[document])
        return values[base + start : base + (length if stop is None else min(stop, length))]


def open_dataset(directory: Path, tokenizer: Tokenizer | None = None) -> TokenDataset:
    """A dataset after every file was checked; with `tokenizer`, refused when another one made it."""
    manifest = read_manifest(directory, "token dataset", needs=("shards", "tokenizer_sha256"))
    if tokenizer is not None and manifest["tokenizer_sha256"] != tokenizer_sha256(tokenizer):
        raise DataError(f"{directory} was made with another tokenizer; tokenise the corpus again.")
    return TokenDataset(directory, manifest)


def write_dataset(
    directory: Path,
    documents: Iterable[TokenDocument],
    tokenizer: Tokenizer,
    *,
    parent_sha256: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenDataset:
    """Writes `documents` as a dataset, in place of an older one. `parent_sha256` names their corpus.

    Documents of fewer than two tokens predict nothing; they are left out and counted in the manifest.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    directory.parent.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    totals = {"documents": 0, "tokens": 0, "bytes": 0}
    too_short = 0

    def long_enough() -> Iterator[TokenDocument]:
        nonlocal too_short
        for document in documents:
            if len(document.ids) < 2:
                too_short += 1
            else:
                yield document

    with room_on_disk(directory), replacing_directory(directory) as beside:
        for shard in _shards(long_enough(), shard_tokens):
            name = f"shard-{len(names):05d}"
            names.append(name)
            _save(beside / f"{name}.tokens.npy", np.frombuffer(shard.ids, dtype=np.uint32).astype(dtype))
            _save(beside / f"{name}.starts.npy", np.array(shard.starts, dtype=np.int64))
            _save(beside / f"{name}.bytes.npy", np.array(shard.byte_counts, dtype=np.int64))
            if not all(shard.learn):
                _save(beside / f"{name}.learn.npy", np.frombuffer(shard.learn, dtype=bool))
            totals["documents"] += len(shard.byte_counts)
            totals["tokens"] += len(shard.ids)
            totals["bytes"] += sum(shard.byte_counts)
        if not names:
            raise DataError(f"no documents to write to {directory}; the source is empty.")
        manifest = {
            "kind": "token dataset",
            "parent_sha256": parent_sha256,
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "vocab_size": tokenizer.vocab_size,
            **totals,
            "too_short": too_short,
            "shards": names,
            "files": {path.name: note_file(path) for path in sorted(beside.glob("*.npy"))},
        }
        write_json(beside / "manifest.json", manifest)
    return TokenDataset(directory, manifest)


def tokenize_corpus(
    corpus: Corpus,
    split: Split,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    source: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> TokenDataset:
    """Writes one split of a corpus (of one source of it) as a dataset; a document stands between two `<|endoftext|>`.

    The mark in front makes the first token of the text a prediction too, so that bits per byte count the whole text.
    """
    documents = _tokenized(corpus, split, tokenizer, source, progress)
    return write_dataset(directory, documents, tokenizer, parent_sha256=corpus.sha256)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Identity of a tokenizer: the hash of its vocabulary, merges and rules."""
    return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()


def _tokenized(
    corpus: Corpus, split: Split, tokenizer: Tokenizer, source: str | None, progress: Progress
) -> Iterator[TokenDocument]:
    end, total, done = tokenizer.pad_id, corpus.manifest["splits"][split]["documents"], 0
    for texts in _batches(corpus.documents(split)):
        chosen = [document.text for document in texts if source is None or document.source == source]
        # A document must not be able to speak as a role.
        for text, ids in zip(chosen, tokenizer.encode_batch(chosen, allow_special=False), strict=True):
            yield TokenDocument([end, *ids, end], len(text.encode()))
        done += len(texts)
        progress(f"tokenising {split}", done, total)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about a million characters, which the tokenizer encodes on all of its threads."""
    held, size = [], 0
    for document in documents:
        held.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _shards(documents: Iterable[TokenDocument], shard_tokens: int) -> Iterator[_Shard]:
    """Groups whole documents until a shard has at least `shard_tokens` tokens."""
    shard = _Shard()
    for document in documents:
        shard.ids.extend(document.ids)
        shard.learn += bytes(document.learn if document.learn is not None else b"\1" * len(document.ids))
        shard.starts.append(len(shard.ids))
        shard.byte_counts.append(document.byte_count)
        if len(shard.ids) >= shard_tokens:
            yield shard
            shard = _Shard()
    if shard.byte_counts:
        yield shard


def _save(path: Path, values: NDArray[Any]) -> None:
    with replacing(path) as file:
        np.save(file, values)
