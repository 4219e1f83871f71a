"""Exact parameter counts in closed form, part by part (GLM-5 report, table 10).

Counts hold the router's correction bias, a buffer of one value per expert: 75 x 256 = 19,200 in `glm-5`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm5.config.model_config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Counts of one model; the fields ending in `_layer` hold for a single layer that has the part."""

    attention_layer: int
    indexer_layer: int
    dense_mlp_layer: int
    expert: int
    shared_experts_layer: int
    router_layer: int
    norms_layer: int
    embedding: int
    """Input embedding, and the output head again: they are not tied."""
    total: int
    active: int
    mtp: int
    mtp_active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts for `config`; see `ParameterCount`."""
    c = config
    d, heads = c.hidden_size, c.num_attention_heads
    attention = (
        d * c.q_lora_rank + c.q_lora_rank  # q_a_proj and its norm
        + c.q_lora_rank * heads * c.qk_head_dim  # q_b_proj
        + d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank  # kv_a_proj_with_mqa and its norm
        + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)  # kv_b_proj
        + heads * c.v_head_dim * d  # o_proj
    )  # fmt: skip
    indexer = (
        c.q_lora_rank * c.index_n_heads * c.index_head_dim  # wq_b
        + d * c.index_head_dim + 2 * c.index_head_dim  # wk and its LayerNorm
        + d * c.index_n_heads  # weights_proj
    )  # fmt: skip
    expert = 3 * d * c.moe_intermediate_size
    shared = expert * c.n_shared_experts
    router = d * c.n_routed_experts + c.n_routed_experts
    dense_mlp = 3 * d * c.intermediate_size
    norms = 2 * d
    embedding = c.vocab_size * d

    full = sum(kind == "full" for kind in c.indexer_types)
    sparse = sum(kind == "sparse" for kind in c.mlp_layer_types)
    dense = c.num_hidden_layers - sparse
    common = c.num_hidden_layers * (attention + norms) + full * indexer + dense * dense_mlp + sparse * (router + shared)
    head = embedding + d  # lm_head and the final norm
    mtp_rest = attention + indexer + norms + router + shared + 2 * d * d + 3 * d  # eh_proj; enorm, hnorm, head norm
    return ParameterCount(
        attention_layer=attention,
        indexer_layer=indexer,
        dense_mlp_layer=dense_mlp,
        expert=expert,
        shared_experts_layer=shared,
        router_layer=router,
        norms_layer=norms,
        embedding=embedding,
        total=common + sparse * c.n_routed_experts * expert + embedding + head,
        active=common + sparse * c.num_experts_per_tok * expert + head,
        mtp=c.num_nextn_predict_layers * (mtp_rest + c.n_routed_experts * expert),
        mtp_active=c.num_nextn_predict_layers * (mtp_rest + c.num_experts_per_tok * expert),
    )
