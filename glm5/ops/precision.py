"""What must not be rounded: router scores, index weights and the indexer's loss stay in fp32 under autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off around operations whose inputs were widened on purpose."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
