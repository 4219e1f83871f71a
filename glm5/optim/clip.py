"""Clipping of gradients by their global norm, also where they are cut over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from glm5.optim.shards import local


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter],
    most: float,
    *,
    pipeline: dist.ProcessGroup | None = None,
    copies: Iterable[nn.Parameter] = (),
) -> float:
    """Scales the gradients so that their norm is at most `most`; gives the norm before.

    pipeline: the processes that hold other layers, if any; all of them must call this. copies: parameters that another
    of them counts; they are scaled with the others.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    if pipeline is None and not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(with_gradient, most).item()
    squares: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
    elsewhere = {id(parameter.grad) for parameter in copies}
    for gradient in gradients:
        if id(gradient) in elsewhere:
            continue
        groups = _cutting(gradient)
        square = torch.linalg.vector_norm(local(gradient)).square()
        squares[groups] = squares[groups] + square if groups in squares else square
    total = torch.zeros((), device=gradients[0].device if gradients else None)
    for groups, square in squares.items():
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total + square
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline)
    norm = total.sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor)
    return norm.item()


def _cutting(gradient: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which a gradient is cut."""
    if not isinstance(gradient, DTensor):
        return ()
    mesh = gradient.device_mesh
    return tuple(
        mesh.get_group(i) for i, placement in enumerate(gradient.placements)
        if not placement.is_replicate() and mesh.size(i) > 1
    )  # fmt: skip
