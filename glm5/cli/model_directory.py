"""Where the model is: a run directory keeps it in `model/`, a model directory is one itself."""

from __future__ import annotations

from pathlib import Path

from glm5.errors import InputError


def model_directory(path: Path) -> Path:
    """The Hugging Face directory in or at `path`. Raises `InputError` when there is none."""
    for directory in (path / "model", path):
        if (directory / "config.json").is_file():
            return directory
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run directory or a model directory.")
    raise InputError(
        f"{path} holds no model (neither config.json nor model/config.json); give a run or model directory."
    )
