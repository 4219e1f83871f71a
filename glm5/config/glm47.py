"""A read-only description of GLM-4.7 (355B-A32B), the grouped-query predecessor that the planner compares GLM-5 with.

Architecture as in the GLM-4.5 report (arXiv 2508.06471, table 1); GLM-4.6 and 4.7 keep it. No module of this project
runs it. Not described: the values of its special tokens and its rotary base, which change no count.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GLM47Config:
    """Shape of GLM-4.7 under Hugging Face's `glm4_moe` field names."""

    vocab_size: int = 151_552
    hidden_size: int = 5120
    num_hidden_layers: int = 92
    num_attention_heads: int = 96
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 12_288
    moe_intermediate_size: int = 1536
    n_routed_experts: int = 160
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    first_k_dense_replace: int = 3
    max_position_embeddings: int = 202_752
    num_nextn_predict_layers: int = 1

    @property
    def attention_parameters(self) -> int:
        """One layer: q, k, v with bias, o without, and the norms of query and key heads."""
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        projections = self.hidden_size * (2 * query + 2 * key_value)
        return projections + query + 2 * key_value + 2 * self.head_dim

    def num_parameters(self, *, mtp: bool = False, active: bool = False) -> int:
        """Weights and router-bias buffers; `active` counts those that one token touches (no input embedding)."""
        d, layers = self.hidden_size, self.num_hidden_layers
        expert = 3 * d * self.moe_intermediate_size
        experts = (self.num_experts_per_tok if active else self.n_routed_experts) + self.n_shared_experts
        sparse_layer = (d + 1) * self.n_routed_experts + experts * expert
        block = self.attention_parameters + 2 * d
        dense = self.first_k_dense_replace
        trunk = layers * block + (layers - dense) * sparse_layer + dense * 3 * d * self.intermediate_size + d
        total = trunk + self.vocab_size * d * (1 if active else 2)
        if mtp:
            total += self.num_nextn_predict_layers * (block + sparse_layer + 2 * d * d + 3 * d)
        return total
