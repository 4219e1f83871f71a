"""Collectives that autograd understands, for losses of which every rank holds a copy or a part.

The backward of each follows from one convention: the gradient of a tensor is that of the one loss of the whole world.
Where ranks compute the same loss from parts of the weights (tensor parallel, Megatron-LM section 3, arXiv 1909.08053),
`copy_to` and `sum_over` are each other's backward; where ranks compute parts of the loss from parts of the rows
(context parallel), what was gathered goes back as a sum of everybody's gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad, ctx.group), None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return total(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        ranks = dist.get_world_size(group)
        whole = x.new_empty(ranks * x.shape[0], *x.shape[1:])
        dist.all_gather_single(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        part = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_single(part, grad.contiguous(), group=ctx.group)
        return part, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(dist.get_world_size(ctx.group), dim=-1)[dist.get_rank(ctx.group)], None


def copy_to(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x`, which all ranks hold, on its way into computations that differ by rank; backward sums their gradients."""
    return _CopyTo.apply(x, group)


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of every rank's `x`; the sum is used alike by all ranks, so its gradient is each summand's."""
    return _SumOver.apply(x, group)


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's `x` of equal shape, joined in the order of ranks along the first dimension; backward sums."""
    return _Gather.apply(x, group)


def join(x: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's columns of a tensor that all ranks go on to use alike; backward takes the own columns."""
    return _Join.apply(x, group)


@torch.no_grad()
def total(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of every rank's `x`, without a gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x
