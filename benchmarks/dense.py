"""A plain dense language model in the manner of nanoGPT: the honest reference line of the training benchmarks.

RoPE, RMSNorm, SwiGLU, fused causal attention, an untied output head, and nothing else: no latents, no indexer, no
experts. `like` chooses the SwiGLU width so that a token touches as many weights as in a given GLM-5 model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.ops.rotary import Rotation, rotate, rotation


class Block(nn.Module):
    """`h += attention(norm(h)); h += swiglu(norm(h))`."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, h_BTD: Tensor, turn: Rotation) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(h_BTD)).unflatten(-1, (3 * self.heads, -1)).chunk(3, dim=2)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, turn), rotate(k, turn), v))
        o_BHTV = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h_BTD = h_BTD + self.out(o_BHTV.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(h_BTD)).chunk(2, dim=-1)
        return h_BTD + self.down(F.silu(gate) * up)


class Dense(nn.Module):
    """Logits [B, T, V] from token ids [B, T]."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, inner: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        positions_BT = torch.arange(ids_BT.shape[1])[None]
        turn = rotation(positions_BT, self.head_width, 1e6, torch.float32, interleaved=True)
        h_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            h_BTD = block(h_BTD, turn)
        return self.head(self.norm(h_BTD))

    def active_parameters(self) -> int:
        """Weights that one token touches: all but the input embedding."""
        return sum(p.numel() for p in self.parameters()) - self.embedding.weight.numel()


def like(config: ModelConfig) -> Dense:
    """The dense model with the vocabulary, width, layers, heads and active weights of `config` (within 1%)."""
    c = config
    spare = c.num_parameters(active=True) - c.vocab_size * c.hidden_size - c.num_hidden_layers * 4 * c.hidden_size**2
    inner = round(spare / (3 * c.hidden_size * c.num_hidden_layers) / 8) * 8
    return Dense(c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, inner)
