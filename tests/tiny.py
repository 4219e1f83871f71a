"""Small random models with every part, for tests of any room."""

from __future__ import annotations

import torch

import glm5
from glm5.model import initialize_


def tiny_config(**changes: object) -> glm5.ModelConfig:
    """A model of two layers with every part, small enough for a unit test; index_topk is 8."""
    values: dict[str, object] = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
        "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "index_n_heads": 16, "index_head_dim": 8, "index_topk": 8,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 4096, "dtype": "float32",
    }  # fmt: skip
    values.update(changes)
    return glm5.ModelConfig(**values)


def tiny_model(seed: int = 0, *, std: float = 0.2, dtype: torch.dtype = torch.float32, **changes: object) -> glm5.GLM5:
    """A random tiny model; a wide initialisation makes every part matter in the logits."""
    model = glm5.GLM5(tiny_config(**changes), dtype=dtype)
    initialize_(model, std, seed)
    return model.eval()
