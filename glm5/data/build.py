"""From sources to everything that training reads: corpus, tokenizer and token shards, in one directory.

    OUT/corpus  OUT/tokenizer  OUT/train  OUT/heldout  OUT/manifest.json

The directory appears when all of it is finished, in place of an older build; a build that is stopped or fails leaves
what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm5.data.corpus import SPLITS, build_corpus
from glm5.data.manifest import note_file
from glm5.data.shards import tokenize_corpus, tokenizer_sha256
from glm5.data.sources import Source
from glm5.errors import DataError
from glm5.files import replacing_directory, write_json
from glm5.text import Tokenizer

Progress = Callable[[str, int, int | None], None]
"""Told (what is being done, how much is done, of how much or None)."""


@dataclass(frozen=True)
class Built:
    """A finished build."""

    directory: Path
    manifest: dict[str, Any]


def build_data(
    out: Path,
    sources: Sequence[Source] | None = None,
    *,
    tokenizer: Path | None = None,
    vocab_size: int = 4096,
    heldout_per_thousand: int = 20,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Built:
    """Builds `out` from `sources` (None: the installed packages).

    tokenizer: a directory that holds one; None: one of `vocab_size` tokens is learned from the training split. Raises
    DataError when `out` is taken: with `overwrite`, only an earlier build is replaced.
    """
    check_free(out, overwrite)
    given = None if tokenizer is None else Tokenizer.from_pretrained(tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_directory(out) as beside:
        progress("reading sources", 0, None)
        corpus = build_corpus(beside / "corpus", sources, heldout_per_thousand=heldout_per_thousand)
        if given is None:
            progress("learning a tokenizer", 0, None)
            given = Tokenizer.train(corpus.texts("train"), vocab_size)
        given.save(beside / "tokenizer")
        datasets = {}
        for split in SPLITS:
            progress(f"tokenising {split}", 0, corpus.manifest["splits"][split]["documents"])
            made = tokenize_corpus(corpus, split, given, beside / split)
            datasets[split] = {name: made.manifest[name] for name in ("documents", "tokens", "bytes")}
        manifest = {
            "kind": "data build",
            "sources": corpus.manifest["sources"],
            "skipped_sources": corpus.manifest["skipped_sources"],
            "tokenizer": {"sha256": tokenizer_sha256(given), "vocab_size": given.vocab_size},
            "datasets": datasets,
            "files": {
                str(path.relative_to(beside)): note_file(path)
                for path in sorted([*beside.glob("*/manifest.json"), *beside.glob("tokenizer/*")])
            },
        }
        write_json(beside / "manifest.json", manifest)
    return Built(out, manifest)


def check_free(out: Path, overwrite: bool) -> None:
    """Raises DataError unless `out` is absent or empty, or an earlier build that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = out / "manifest.json"
    ours = manifest.is_file() and '"kind": "data build"' in manifest.read_text(encoding="utf-8", errors="replace")[:100]
    if not ours:
        raise DataError(f"{out} holds something that is not a data build; choose another directory.")
    if not overwrite:
        raise DataError(f"{out} already holds a data build; replace it with --overwrite, or choose another directory.")
