"""Checks everything that was built under a directory: every file against its manifest, every link to its parent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm5.data.manifest import read_manifest
from glm5.data.shards import tokenizer_sha256
from glm5.errors import DataError, GLM5Error
from glm5.files import sha256_of
from glm5.text import Tokenizer


@dataclass(frozen=True)
class Finding:
    """One directory with a manifest, and what is wrong with it."""

    directory: Path
    kind: str
    files: int
    problems: tuple[str, ...]


def verify(root: Path) -> list[Finding]:
    """Rehashes everything with a manifest of ours at or under `root`: builds, corpora, datasets, worlds.

    Raises DataError when there is nothing.
    """
    manifests = [path for path in sorted(root.rglob("manifest.json")) if not in_hidden(path, root)]
    found = [finding for path in manifests if (finding := check(path)) is not None]
    if not found:
        raise DataError(f"{root} holds no corpus and no dataset; give a directory that `glm5 data build` wrote.")
    return found


def check(path: Path) -> Finding | None:
    """What is wrong with the directory of one manifest; None for another program's manifest."""
    directory = path.parent
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Finding(directory, "unknown", 0, (f"{path} is not JSON; build it again.",))
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if not isinstance(kind, str) or not isinstance(manifest.get("files"), dict):
        return None
    problems = []
    for name, noted in manifest["files"].items():
        try:
            read_manifest(directory, kind, files={name: noted})
        except DataError as error:
            problems.append(str(error))
    problems += broken_links(directory, manifest)
    return Finding(directory, kind, len(manifest["files"]), tuple(problems))


def broken_links(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """A dataset that stands beside a corpus and a tokenizer must come from them."""
    problems = []
    tokenizer, parent = beside(directory, "tokenizer/tokenizer.json"), manifest.get("parent_sha256")
    corpus = beside(directory, "corpus/manifest.json")
    if parent is not None and corpus is not None and sha256_of(corpus / "manifest.json") != parent:
        problems.append(f"{directory} was made from another corpus than {corpus}; tokenise the corpus again.")
    if "tokenizer_sha256" in manifest and tokenizer is not None:
        try:
            same = tokenizer_sha256(Tokenizer.from_pretrained(tokenizer)) == manifest["tokenizer_sha256"]
        except GLM5Error as error:
            problems.append(str(error))
        else:
            if not same:
                problems.append(f"{directory} was made with another tokenizer than {tokenizer}; tokenise again.")
    return problems


def tokenizer_beside(dataset: Path) -> Path | None:
    """The tokenizer that a build keeps beside its datasets, or one level up."""
    return beside(dataset, "tokenizer/tokenizer.json")


def beside(directory: Path, file: str) -> Path | None:
    """The directory of `file`, which is looked for beside `directory` and one level up."""
    for parent in directory.absolute().parents[:2]:
        if (parent / file).is_file():
            return (parent / file).parent
    return None


def in_hidden(path: Path, root: Path) -> bool:
    """Half-written leftovers of killed writers have hidden names."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)
