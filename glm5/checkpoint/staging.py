"""A directory that appears whole or not at all.

Everything is written into a hidden sibling, flushed to the disk, and renamed. An existing model directory is moved
aside only when the new one is complete, and comes back if the rename fails; its files that are neither weights nor
written anew (a tokenizer, a model card) move into the new directory. A killed process leaves at most a hidden
`.partial` sibling, which the next save of that name does not mind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm5.errors import CheckpointError


@contextmanager
def staged_directory(destination: Path) -> Iterator[Path]:
    """Yields an empty directory that takes the name `destination` when the block ends without an exception.

    Raises `CheckpointError` when the destination holds something that is not a model, or when the disk refuses a write.
    """
    destination = destination.resolve()
    check_destination(destination)
    stage = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(stage, ignore_errors=True)  # left by a killed process that had the same number
        stage.mkdir(parents=True)
        yield stage
        for path in [*stage.rglob("*"), stage]:
            _flush(path)
        _take_place(stage, destination)
        _flush(destination.parent)
    except OSError as error:
        raise CheckpointError(
            f"Writing {destination} failed ({error}); nothing there was changed. "
            "Free some space or choose another place, then save again."
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_destination(destination: Path) -> None:
    """Refuses a destination that a save would destroy: a file, or a directory with content that is not a model."""
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; give the name of a directory.")
    if destination.is_dir() and not (destination / "config.json").is_file() and any(destination.iterdir()):
        raise CheckpointError(
            f"{destination} is not empty and holds no model (no config.json); choose another directory or empty it."
        )


def check_space(destination: Path, num_bytes: int) -> None:
    """Refuses to begin what the disk cannot hold: the new directory stands beside the old one until it is whole."""
    parent = destination.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{destination} needs {num_bytes / 1e9:,.1f} GB and {parent} has {free / 1e9:,.1f} GB free; "
            "free some space or choose another disk."
        )


def _take_place(stage: Path, destination: Path) -> None:
    if not (destination / "config.json").is_file():
        os.rename(stage, destination)  # a new name, or an empty directory, which rename replaces
        return
    old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
    try:
        os.rename(destination, old)
        os.rename(stage, destination)
    except BaseException:
        if old.exists() and not destination.exists():
            os.rename(old, destination)
        raise
    for path in old.iterdir():
        if not _is_weights(path) and not (destination / path.name).exists():
            os.rename(path, destination / path.name)
    shutil.rmtree(old)


def _is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
