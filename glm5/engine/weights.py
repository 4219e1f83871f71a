"""New weights for a running engine: checked and brought into the model's form aside, swapped at once between steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glm5.errors import InputError


def staged(model: nn.Module, state_dict: Mapping[str, Tensor], version: int) -> dict[str, Tensor]:
    """The new weights in the dtype and place of the model's own, which stay as they are.

    Raises InputError unless names and shapes are the model's, or those of all its adapters, and all values are finite
    in its dtype.
    """
    own = model.state_dict()
    adapters = {name: tensor for name, tensor in own.items() if "lora_" in name}
    if adapters and not state_dict.keys() - adapters.keys():
        own = adapters
    for what, names in (("lack", own.keys() - state_dict.keys()), ("hold unknown", state_dict.keys() - own.keys())):
        if names:
            raise InputError(f"The new weights {what} {sorted(names)[0]!r} ({len(names)} such); send the full model.")
    ready = {}
    for name, tensor in state_dict.items():
        if tensor.shape != own[name].shape:
            raise InputError(f"{name} is {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}; send its own.")
        ready[name] = tensor.detach().to(own[name])
        if not ready[name].isfinite().all():
            raise InputError(f"{name} of version {version} holds NaN or infinity; keep the weights from before.")
    return ready


@torch.no_grad()
def swap(model: nn.Module, ready: Mapping[str, Tensor]) -> None:
    """Copies staged weights over the model's own, in place: whoever reads the model's memory sees them at once."""
    own = model.state_dict()
    for name, tensor in ready.items():
        own[name].copy_(tensor)
