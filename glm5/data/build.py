"""From sources to everything that training reads: corpus, tokenizer and token shards, in one directory.

    OUT/corpus  OUT/tokenizer  OUT/train  OUT/heldout  OUT/manifest.json

With `separate`, OUT/train holds a dataset per source, and `shares_of(OUT)` gives them with their weights for a mixture.
The directory appears when all of it is finished, in place of an older build; a build that is stopped or fails leaves
what was there before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm5.data.corpus import Corpus, Progress, build_corpus
from glm5.data.manifest import note_file, read_manifest, room_on_disk
from glm5.data.mixture import Share
from glm5.data.recipe import DataRecipe
from glm5.data.shards import TokenDataset, tokenize_corpus, tokenizer_sha256
from glm5.data.sources import Source
from glm5.errors import DataError
from glm5.files import replacing_directory, write_json
from glm5.text import Tokenizer


@dataclass(frozen=True)
class Built:
    """A finished build."""

    directory: Path
    manifest: dict[str, Any]


def build_data(
    out: Path,
    recipe: DataRecipe = DataRecipe(),
    *,
    sources: Sequence[Source] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Built:
    """Builds `out`. sources: in place of the recipe's, for what no recipe can name.

    Raises DataError when `out` is taken: with `overwrite`, only an earlier build is replaced.
    """
    check_free(out, overwrite)
    named = recipe.named_sources() if sources is None else [(source, None) for source in sources]
    tokenizer = None if recipe.tokenizer is None else Tokenizer.from_pretrained(recipe.tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with room_on_disk(out), replacing_directory(out) as beside:
        corpus = build_corpus(
            beside / "corpus",
            [source for source, _ in named],
            heldout_per_thousand=recipe.heldout_per_thousand,
            preparation=recipe.preparation,
            progress=progress,
        )
        if tokenizer is None:
            progress("learning a tokenizer", 0, None)
            tokenizer = Tokenizer.train(corpus.sample("train", recipe.tokenizer_megabytes * 10**6), recipe.vocab_size)
        tokenizer.save(beside / "tokenizer")
        if recipe.separate:
            train = tokenize_separately(corpus, tokenizer, beside, {s.name: weight for s, weight in named}, progress)
        else:
            train = {"train": counts(tokenize_corpus(corpus, "train", tokenizer, beside / "train", progress=progress))}
        held = tokenize_corpus(corpus, "heldout", tokenizer, beside / "heldout", progress=progress)
        manifest = {
            "kind": "data build",
            "sources": corpus.manifest["sources"],
            "skipped_sources": corpus.manifest["skipped_sources"],
            "tokenizer": {"sha256": tokenizer_sha256(tokenizer), "vocab_size": tokenizer.vocab_size},
            "datasets": {**train, "heldout": counts(held)},
            "files": {
                path.relative_to(beside).as_posix(): note_file(path)
                for path in sorted([*beside.glob("*/**/manifest.json"), *beside.glob("tokenizer/*")])
            },
        }
        write_json(beside / "manifest.json", manifest)
    return Built(out, manifest)


def tokenize_separately(
    corpus: Corpus, tokenizer: Tokenizer, beside: Path, weights: dict[str, float | None], progress: Progress
) -> dict[str, Any]:
    """A training dataset per source that has training documents."""
    have = {document.source for document in corpus.documents("train")}
    found = {}
    for name in [source["name"] for source in corpus.manifest["sources"] if source["name"] in have]:
        place = f"train/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
        made = tokenize_corpus(corpus, "train", tokenizer, beside / place, source=name, progress=progress)
        weight = weights[name]
        found[place] = {**counts(made), "weight": made.manifest["tokens"] if weight is None else weight}
    return found


def shares_of(out: Path) -> tuple[Share, ...]:
    """The training datasets of a build as shares of a mixture: one, or one per source."""
    datasets = read_manifest(out, "data build", needs=("datasets",))["datasets"]
    return tuple(
        Share(path=out / place, weight=part.get("weight", 1.0))
        for place, part in datasets.items()
        if place != "heldout"
    )


def counts(dataset: TokenDataset) -> dict[str, Any]:
    """What a build's manifest says of a dataset."""
    return {name: dataset.manifest[name] for name in ("documents", "tokens", "bytes")}


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
