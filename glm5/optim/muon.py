"""Muon, with Muon Split: in a parameter that stacks heads or experts, each is orthogonalised by itself.

GLM-5 report, section 2.1 (Muon Split) and appendix A (momentum 0.95, five Newton-Schulz steps, update RMS 0.2). W^UQ,
W^UK and W^UV are cut per head, stacked experts per expert, gate and up apart; orthogonalising them as one matrix would
tie the step of one head to the gradients of another, and MLA's attention logits then grow without bound. Non-rotary and
rotary rows stay together: in each head of W^UQ (`q_b_proj`) and in `kv_a_proj_with_mqa`, which is one matrix. Each
update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the root mean square of an AdamW update (Moonlight,
arXiv 2502.16982, section 2.2), so one learning rate serves both optimisers.

Left out: shards of a matrix on several ranks (the gradient must be whole when `step` is called).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from glm5.optim.newton_schulz import orthogonalise

Split = Callable[[Tensor], list[Tensor]]
"""Cuts a tensor of the parameter's shape into views [matrices, rows, columns] that cover it once."""

UPDATE_RMS = 0.2


def whole(x: Tensor) -> list[Tensor]:
    """A plain matrix [rows, columns]."""
    return [x.unsqueeze(0)]


def heads(count: int, *widths: int) -> Split:
    """A projection [count * sum(widths), columns] whose heads each stack matrices of `widths` rows."""

    def split(x: Tensor) -> list[Tensor]:
        return list(x.unflatten(0, (count, sum(widths))).split(widths, dim=1))

    return split


def experts(parts: int) -> Split:
    """Stacked experts [E, parts * rows, columns], each of `parts` matrices on top of one another."""

    def split(x: Tensor) -> list[Tensor]:
        return list(x.chunk(parts, dim=1))

    return split


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; decoupled weight decay. On plain matrices equal to `torch.optim.Muon`.

    `parameters` pairs each parameter with its `Split`. A parameter without a gradient is left alone, decay included.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[nn.Parameter, Split]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        pairs = list(parameters)
        self._splits = dict(pairs)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([parameter for parameter, _ in pairs], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameter: nn.Parameter, lr: float, momentum: float, weight_decay: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(average, momentum)  # Nesterov: look one step ahead of the average

        split = self._splits[parameter]
        parameter.mul_(1 - lr * weight_decay)
        for weights, matrices in zip(split(parameter), split(direction), strict=True):
            scale = UPDATE_RMS * math.sqrt(max(matrices.shape[-2:]))
            weights.add_(orthogonalise(matrices), alpha=-lr * scale)
