"""New weights for a running engine: all checked first, then put in place at once between two steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glm5.errors import InputError


def checked(own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """Raises InputError unless the new weights have the names and shapes of `own` (which may be on the meta device)."""
    for what, names in (("lack", own.keys() - state_dict.keys()), ("hold unknown", state_dict.keys() - own.keys())):
        if names:
            raise InputError(f"The new weights {what} {sorted(names)[0]!r} ({len(names)} such); send the full model.")
    for name, tensor in state_dict.items():
        if tensor.shape != own[name].shape:
            raise InputError(f"{name} is {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}; send its own.")


def finite(name: str, tensor: Tensor, version: int) -> Tensor:
    """The tensor, or InputError if it holds a value that is not finite in its dtype."""
    if not tensor.isfinite().all():
        raise InputError(f"{name} of version {version} holds NaN or infinity; keep the weights from before.")
    return tensor


class ModelWeights:
    """The weights of a model that lies whole in this process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def staged(self, state_dict: Mapping[str, Tensor], version: int) -> dict[str, Tensor]:
        """The new weights in the dtype and place of the model's own, which stay as they are.

        Raises InputError unless names and shapes are the model's, or those of all its adapters, and all values are
        finite in its dtype.
        """
        own = self.model.state_dict()
        adapters = {name: tensor for name, tensor in own.items() if "lora_" in name}
        if adapters and not state_dict.keys() - adapters.keys():
            own = adapters
        checked(own, state_dict)
        return {name: finite(name, tensor.detach().to(own[name]), version) for name, tensor in state_dict.items()}

    @torch.no_grad()
    def swap(self, ready: Mapping[str, Tensor]) -> None:
        """Copies staged weights over the model's own, in place: whoever reads the model's memory sees them at once."""
        own = self.model.state_dict()
        for name, tensor in ready.items():
            own[name].copy_(tensor)
