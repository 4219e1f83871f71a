"""Manifests: the `manifest.json` of a built directory, which lists its files with size and hash, checked before use."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm5.errors import DataError
from glm5.files import restore_directory, sha256_of


def read_manifest(
    directory: Path, kind: str, *, needs: tuple[str, ...] = (), files: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The manifest of `directory`, after every file that it lists under "files" was found with the size and hash noted.

    needs: entries that the caller will use. files: check these files only, in place of all.

    Raises DataError that names the file: missing, cut short, changed, or written by another kind of builder.
    """
    restore_directory(directory)
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{directory} has no manifest.json, so it is no finished {kind}; build it again.") from None
    except ValueError:
        raise DataError(f"{path} is not JSON; build the {kind} again.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise DataError(f"{path} does not describe a {kind}; point to the right directory.")
    for entry in (*needs, "files"):
        if entry not in manifest:
            raise DataError(f"{path} has no entry {entry!r}, as if another version wrote it; build the {kind} again.")
    for name, noted in (manifest["files"] if files is None else files).items():
        file = directory / name
        if not file.is_file():
            raise DataError(f"{file} is listed in the manifest but missing; build the {kind} again.")
        if file.stat().st_size != noted["size"] or sha256_of(file) != noted["sha256"]:
            raise DataError(f"{file} does not match the manifest (damaged or edited); build the {kind} again.")
    return manifest


def note_file(path: Path) -> dict[str, Any]:
    """What a manifest notes about a file."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


class DiskFull(DataError):
    """The disk has no room for what is being written."""


@contextlib.contextmanager
def room_on_disk(path: Path) -> Iterator[None]:
    """Turns a full disk into a DataError that names `path`, the outermost where blocks are nested.

    What was being written is removed by its writer.
    """
    try:
        yield
    except (OSError, DiskFull) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"the disk is full, so {path} was not written; nothing of it is left. Free some space and try again."
        ) from None
