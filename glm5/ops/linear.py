"""`Linear`: a weight without bias that owns its storage, and may carry a low-rank adapter.

Attention in the absorbed form needs the weight itself rather than its product with an input, so `effective_weight`
gives it with the adapter merged. Adapters (LoRA, Hu et al. 2021) add `scale * B A` and train while the base is frozen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """`scale * B A` on a weight [..., out, in]; a leading expert dimension is allowed. B starts at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        *lead, out_features, in_features = weight.shape
        place: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(*lead, rank, in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(*lead, out_features, rank, **place))
        self.scale = alpha / rank
        if not weight.is_meta:
            nn.init.uniform_(self.lora_A, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    def delta(self) -> Tensor:
        """The change of the weight, in its shape."""
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """The change of the product, for a weight without expert dimension."""
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


class Linear(nn.Module):
    """`x @ weight.T` with weight [out, in]; no bias anywhere in GLM-5."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.adapter: LowRank | None = None

    def effective_weight(self) -> Tensor:
        """The weight [out, in] with the adapter merged in; differentiable."""
        return self.weight if self.adapter is None else self.weight + self.adapter.delta()

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if self.adapter is None else y + self.adapter(x)
