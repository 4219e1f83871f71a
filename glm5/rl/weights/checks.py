"""What weights must be before anybody is asked to take them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from glm5.errors import InputError
from glm5.rl.weights.layout import check_newer


def check_publication(
    version: int, tensors: Mapping[str, Tensor], *, newest: int, shapes: Mapping[str, tuple[int, ...]] | None
) -> None:
    """Raises `InputError` or `WeightsError` for what an engine with weights of these shapes would refuse.

    Accepted are all tensors of the model, or all of its adapters, with finite values.
    """
    check_newer(version, newest)
    if shapes is not None:
        adapters = {name: shape for name, shape in shapes.items() if "lora_" in name}
        own = adapters if adapters and not tensors.keys() - adapters.keys() else shapes
        for what, names in (("lack", own.keys() - tensors.keys()), ("hold unknown", tensors.keys() - own.keys())):
            if names:
                raise InputError(f"The new weights {what} {sorted(names)[0]!r} ({len(names)} such); send all of them.")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != tuple(own[name]):
                raise InputError(f"{name} is {tuple(tensor.shape)}, the engines have {own[name]}; send their own.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{name} of version {version} holds NaN or infinity; keep the weights from before.")
