"""Low-rank adapters (LoRA, Hu et al. 2021) on any linear or expert weight of a model."""

from __future__ import annotations

from fnmatch import fnmatch

import torch
from torch import nn

from glm5.errors import InputError
from glm5.ops.experts import Experts
from glm5.ops.linear import Linear, LowRank

DEFAULT_TARGETS = ("*.q_a_proj", "*.q_b_proj", "*.kv_a_proj_with_mqa", "*.kv_b_proj", "*.o_proj")


def add_adapters(
    model: nn.Module, *, rank: int = 8, alpha: float = 16.0, targets: tuple[str, ...] = DEFAULT_TARGETS
) -> list[str]:
    """Freezes `model` and gives every module whose name matches a pattern of `targets` an adapter; returns the names.

    The change is zero until training moves it. An adapter of experts is computed as a whole weight in every forward
    pass. Raises InputError for a rank below 1, patterns that match nothing, or a model that has adapters already.
    """
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"LoRA rank is {rank}; give a whole number of at least 1.")
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise InputError("The model has adapters already; merge them first (merge_adapters).")
    model.requires_grad_(False)
    adapted = []
    for name, module in model.named_modules():
        if not any(fnmatch(name, pattern) for pattern in targets):
            continue
        if isinstance(module, Linear):
            module.adapter = LowRank(module.weight, rank, alpha)
        elif isinstance(module, Experts):
            module.gate_up_adapter = LowRank(module.gate_up_proj, rank, alpha)
            module.down_adapter = LowRank(module.down_proj, rank, alpha)
        else:
            continue
        adapted.append(name)
    if not adapted:
        raise InputError(f"No linear or expert weight matches {', '.join(targets)}; patterns look like '*.q_b_proj'.")
    return adapted


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter into its weight and removes it; all weights train again."""
    for module in model.modules():
        if isinstance(module, Linear) and module.adapter is not None:
            module.weight.copy_(module.effective_weight())
            module.adapter = None
        elif isinstance(module, Experts) and module.gate_up_adapter is not None:
            gate_up, down = module.effective_weights()
            module.gate_up_proj.copy_(gate_up)
            module.down_proj.copy_(down)
            module.gate_up_adapter = module.down_adapter = None
    model.requires_grad_(True)
