"""Stacked expert weights and the three ways of running them; `reference.experts` is the truth.

- few tokens on a CPU (decoding): one pair of token and expert after another;
- many tokens: sort by expert and call `torch.nn.functional.grouped_mm`;
- dtypes or widths that grouped_mm does not take: the reference loop.

A provider of routed experts is any module with this `forward`; this one keeps all of them resident.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5.ops import reference
from glm5.ops.linear import LowRank

FEW_TOKENS = 8
"""Tokens of a decode step: sorting them by expert would cost more than it saves (measured on a CPU)."""


class Experts(nn.Module):
    """Routed experts, stacked as `transformers` stacks them: gate and up fused [E, 2I, D], down [E, D, I]."""

    def __init__(
        self, experts: int, width: int, inner: int, *, dtype: torch.dtype, device: torch.device | None
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner, dtype=dtype, device=device))
        self.gate_up_adapter: LowRank | None = None
        self.down_adapter: LowRank | None = None

    def effective_weights(self) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2I, D] and down [E, D, I] with the adapters merged in; differentiable."""
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if self.gate_up_adapter is not None:
            gate_up = gate_up + self.gate_up_adapter.delta()
        if self.down_adapter is not None:
            down = down + self.down_adapter.delta()
        return gate_up, down

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum [N, D] over the chosen experts; weights are cast to the dtype of x."""
        gate_up, down = self.effective_weights()
        return run_experts(x_ND, chosen_NK, weights_NK.to(x_ND.dtype), gate_up, down)


def run_experts(x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Chooses the way of running by shape and dtype; all give the sum of `reference.experts`."""
    on_cpu = x_ND.device.type == "cpu"
    if on_cpu and x_ND.shape[0] <= FEW_TOKENS and not torch.is_grad_enabled():
        return paired_experts(x_ND, chosen_NK, weights_NK, gate_up, down)
    grouped = (torch.bfloat16, torch.float32) if on_cpu else (torch.bfloat16,)
    if x_ND.dtype in grouped and _aligned(gate_up) and _aligned(down):
        return grouped_experts(x_ND, chosen_NK, weights_NK, gate_up, down)
    return reference.experts(x_ND, chosen_NK, weights_NK, gate_up, down)


def _aligned(weight: Tensor) -> bool:
    """grouped_mm wants rows that start at multiples of 16 bytes."""
    return all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])


def paired_experts(x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One (token, expert) pair after another, on views of the weights: nothing is sorted or copied."""
    rows = []
    for x_1D, chosen, weights in zip(x_ND.split(1), chosen_NK.tolist(), weights_NK.tolist(), strict=True):
        y_1D = torch.zeros_like(x_1D)
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = F.linear(x_1D, gate_up[expert]).chunk(2, dim=-1)
            y_1D.add_(F.linear(F.silu(gate) * up, down[expert]), alpha=weight)
        rows.append(y_1D)
    return torch.cat(rows)


def grouped_experts(x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sorts the (token, expert) pairs by expert and multiplies group by group; the sum over experts keeps one order."""
    tokens, per_token = chosen_NK.shape
    flat = chosen_NK.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    hidden = F.grouped_mm(x_ND[order // per_token], gate_up.transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return (y[back].view(tokens, per_token, -1) * weights_NK.unsqueeze(-1)).sum(1)
