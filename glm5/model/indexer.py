"""The lightning indexer (DeepSeek-V3.2 report, section 2.1): a few light heads that score every earlier token.

Its inputs are detached: it learns from the KL loss alone (`ops/indexer_loss.py`), the model from its own losses alone.
Order of a head's dimensions: [rotary | plain], the reverse of the main attention. The Hadamard rotation of the FP8
kernels is left out: it changes no dot product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.ops.indexer_loss import Index
from glm5.ops.linear import Linear
from glm5.ops.precision import full_precision
from glm5.ops.rotary import Rotation, rotate


class Indexer(nn.Module):
    """Projections of one full-indexer layer. `weights_proj` stays in fp32 in a bf16 model."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.rotary_width = config.qk_rope_head_dim
        wide = torch.promote_types(dtype, torch.float32)
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width, dtype=dtype, device=device)
        self.wk = Linear(config.hidden_size, self.width, dtype=dtype, device=device)
        self.k_norm = nn.LayerNorm(self.width, eps=1e-6, dtype=dtype, device=device)
        self.weights_proj = Linear(config.hidden_size, self.heads, dtype=wide, device=device)

    def forward(self, x_BTD: Tensor, c_q_BTC: Tensor, rotation: Rotation) -> Index:
        """Queries [B, T, H, I], keys of the new tokens [B, T, I], scaled head weights [B, T, H]."""
        x_BTD, c_q_BTC = x_BTD.detach(), c_q_BTC.detach()
        q_BTHI = self.wq_b(c_q_BTC).unflatten(-1, (self.heads, self.width))
        k_BTI = self.k_norm(self.wk(x_BTD))
        qk_BTHI = torch.cat((q_BTHI, k_BTI.unsqueeze(2)), dim=2)  # the key as one more head: one rotation for both
        rotary, plain = qk_BTHI.split([self.rotary_width, self.width - self.rotary_width], dim=-1)
        qk_BTHI = torch.cat((rotate(rotary, rotation), plain), dim=-1)
        with full_precision(x_BTD):
            w_BTH = self.weights_proj(x_BTD.to(self.weights_proj.weight.dtype))
        # ReLU lets the scale of q . k, width ** -0.5, join that of the weights.
        return qk_BTHI[:, :, :-1], qk_BTHI[:, :, -1], w_BTH * (self.heads * self.width) ** -0.5
