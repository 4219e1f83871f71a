"""Presets: the published models, and small ones with the same parts. A preset is a function that returns a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from glm5.config.model_config import ModelConfig

# <|endoftext|>, <|user|>, <|observation|>, in the order of `glm5.text.SPECIAL_TOKENS`
_SMALL_VOCABULARY_TOKENS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": (0, 7, 9)}


def glm_5() -> ModelConfig:
    """GLM-5 (February 2026): 744B weights, 40B active, 202,752 positions."""
    return ModelConfig(
        vocab_size=154_880, hidden_size=6144, num_hidden_layers=78, num_attention_heads=64,
        q_lora_rank=2048, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
        intermediate_size=12_288, moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8,
        first_k_dense_replace=3, index_n_heads=32, index_head_dim=128, index_topk=2048,
        num_nextn_predict_layers=1, pad_token_id=154_820, eos_token_id=(154_820, 154_827, 154_829),
    )  # fmt: skip


def glm_5_1() -> ModelConfig:
    """GLM-5.1 (April 2026): the same architecture, other weights and chat template."""
    return glm_5()


def glm_5_2() -> ModelConfig:
    """GLM-5.2 (June 2026): a million positions, and IndexShare: 21 layers select, 57 reuse."""
    return dataclasses.replace(
        glm_5(),
        max_position_embeddings=1_048_576,
        rope_parameters={"rope_theta": 8_000_000, "rope_type": "default"},
        indexer_types=(),
        index_topk_freq=4,
        index_skip_topk_offset=3,
        index_share_for_mtp_iteration=True,
        extra={"moe_router_dtype": "float32"},
    )


def nano() -> ModelConfig:
    """3.6M weights, 1.75M active: trains on a laptop CPU in minutes. Pinned, because published figures use it."""
    return ModelConfig(
        vocab_size=4096, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        intermediate_size=384, moe_intermediate_size=96, n_routed_experts=16, num_experts_per_tok=4,
        first_k_dense_replace=1, index_n_heads=16, index_head_dim=32, index_topk=64,
        num_nextn_predict_layers=1, dtype="float32", **_SMALL_VOCABULARY_TOKENS,
    )  # fmt: skip


def micro() -> ModelConfig:
    """About 20M active: an evening on a workstation CPU, minutes on one GPU."""
    return ModelConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=8, num_attention_heads=6,
        q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=32, v_head_dim=64,
        intermediate_size=1280, moe_intermediate_size=256, n_routed_experts=32, num_experts_per_tok=4,
        first_k_dense_replace=1, index_n_heads=16, index_head_dim=64, index_topk=256,
        num_nextn_predict_layers=1, **_SMALL_VOCABULARY_TOKENS,
    )  # fmt: skip


def mini() -> ModelConfig:
    """About 150M active: one GPU node."""
    return ModelConfig(
        vocab_size=32_768, hidden_size=768, num_hidden_layers=14, num_attention_heads=12,
        q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=128,
        intermediate_size=2304, moe_intermediate_size=512, n_routed_experts=64, num_experts_per_tok=4,
        first_k_dense_replace=2, index_n_heads=16, index_head_dim=64, index_topk=512,
        num_nextn_predict_layers=1, **_SMALL_VOCABULARY_TOKENS,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "glm-5": glm_5, "glm-5.1": glm_5_1, "glm-5.2": glm_5_2, "nano": nano, "micro": micro, "mini": mini,
}  # fmt: skip
