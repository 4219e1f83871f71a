"""The small model that comes with the package, so that `glm5 chat` and `glm5 serve` work without a directory.

`nano/` is a Hugging Face directory that the recipe made; `nano/README.md` is its model card, with the command, commit,
seed and hashes. Nothing else of the package depends on it.
"""

from __future__ import annotations

from pathlib import Path

from glm5.errors import CheckpointError


def bundled_model() -> Path:
    """The directory of the bundled model. Raises `CheckpointError` when this installation came without it."""
    directory = Path(__file__).parent / "nano"
    if not (directory / "config.json").exists():
        raise CheckpointError(
            "This installation of glm5 came without its small model; name a run or a model directory, or train one "
            "with `glm5 quickstart`."
        )
    return directory
