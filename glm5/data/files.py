"""Files that are whole or absent: written beside their place, flushed to the disk, renamed; hashed before use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from glm5.errors import DataError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that takes `path`'s place when the block ends, and leaves nothing behind when it fails."""
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_directory(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, all or nothing."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Gives an empty directory to fill; it takes `path`'s place when the block ends without an error."""
    beside = path.with_name(path.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        _sync_directory(beside)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(beside, path)
        _sync_directory(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path, kind: str) -> dict[str, Any]:
    """The manifest of `directory`, after every file that it lists under "files" was found with the size and hash noted.

    Raises DataError that names the file: missing, cut short, changed, or written by another kind of builder.
    """
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{directory} has no manifest.json, so it is no finished {kind}; build it again.") from None
    except ValueError:
        raise DataError(f"{path} is not JSON; build the {kind} again.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise DataError(f"{path} does not describe a {kind}; point to the right directory.")
    for name, noted in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise DataError(f"{file} is listed in the manifest but missing; build the {kind} again.")
        if file.stat().st_size != noted["size"] or sha256_of(file) != noted["sha256"]:
            raise DataError(f"{file} does not match the manifest (damaged or edited); build the {kind} again.")
    return manifest


def note_file(path: Path) -> dict[str, Any]:
    """What a manifest notes about a file."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":  # a rename is on the disk only when its directory is
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
