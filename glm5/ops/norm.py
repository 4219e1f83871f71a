"""RMSNorm (Zhang & Sennrich 2019) through PyTorch's fused operator; `reference.rms_norm` is the plain form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5.ops import reference


class RMSNorm(nn.Module):
    """Statistics in fp32 whatever the storage dtype; eps is the caller's (1e-5 in blocks, 1e-6 inside MLA)."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.float64):
            return reference.rms_norm(x, self.weight, self.eps)
        if torch.is_grad_enabled():
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # Half as many kernels: a decode step spends its time on starting them.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.rsqrt_(length.square_().div_(x.shape[-1]).add_(self.eps)) * self.weight
