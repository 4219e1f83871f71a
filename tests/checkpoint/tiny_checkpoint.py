"""A tiny model with every kind of tensor: dense and sparse layers, full and shared indexers, an MTP layer."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import glm5

TINY = glm5.ModelConfig(
    vocab_size=160, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, q_lora_rank=40, kv_lora_rank=24,
    qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, intermediate_size=150, moe_intermediate_size=20,
    n_routed_experts=6, num_experts_per_tok=2, first_k_dense_replace=1, index_n_heads=16, index_head_dim=20,
    index_topk=8, indexer_types=("full", "shared", "full"), num_nextn_predict_layers=1, eos_token_id=(1, 2),
    pad_token_id=0, dtype="float32",
)  # fmt: skip


def build_model(config: glm5.ModelConfig = TINY, dtype: torch.dtype = torch.float32, seed: int = 0) -> glm5.GLM5:
    """Random weights everywhere, so that no two tensors are equal by accident (norms start at one, biases at zero)."""
    torch.manual_seed(seed)
    model = glm5.GLM5(config, dtype=dtype)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.1)
    return model


def assert_same_weights(model: glm5.GLM5, other: glm5.GLM5) -> None:
    expected, actual = model.state_dict(), other.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype, name
        assert torch.equal(tensor, actual[name]), name


def tensors_on_disk(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, through the safetensors library."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def checksum(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def files(directory: Path) -> dict[str, str]:
    """Name and digest of everything below a directory."""
    below = (path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in below}
