"""Where a model directory may be written, on top of `glm5.files`, which makes it appear whole or not at all.

Only a model, an empty directory or nothing is replaced. Files of the earlier model that are neither weights nor written
anew (a tokenizer, a model card) are copied into the new directory before it takes the earlier one's place, so that a
killed process loses neither: it leaves the earlier model, under its name or, for the moment between two renames, under
a hidden `.old` name that the next save, conversion or load of that model takes back.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm5.errors import CheckpointError
from glm5.files import replacing_directory, restore_directory


@contextmanager
def staged_directory(destination: Path) -> Iterator[Path]:
    """Yields an empty directory that takes the name `destination` when the block ends without an exception.

    Raises `CheckpointError` when the destination holds something that is not a model, or when the disk refuses a write.
    """
    check_destination(destination)
    try:
        with replacing_directory(destination) as stage:
            yield stage
            _keep_other_files(destination, stage)
    except OSError as error:
        raise CheckpointError(
            f"Writing {destination} failed ({error}); nothing there was changed. "
            "Free some space or choose another place, then save again."
        ) from error


def check_destination(destination: Path) -> None:
    """Refuses a destination that a save would destroy: a file, or a directory with content that is not a model."""
    restore_directory(destination)
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


def _keep_other_files(destination: Path, stage: Path) -> None:
    """Copies what is neither weights nor written anew; links stay links."""
    for path in destination.iterdir() if destination.is_dir() else ():
        kept = stage / path.name
        if _is_weights(path) or kept.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, kept, symlinks=True)
        else:
            shutil.copy2(path, kept, follow_symlinks=False)


def _is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
