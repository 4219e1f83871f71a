"""`--threads N`: how many processor threads PyTorch uses."""

from __future__ import annotations

import torch

from glm5.errors import ConfigError


def use_threads(threads: int | None) -> None:
    """Sets the number; None leaves PyTorch's choice. Raises ConfigError below 1."""
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"threads is {threads}; give at least 1.")
    torch.set_num_threads(threads)
