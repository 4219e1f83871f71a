"""The independent implementation: `transformers` loads what we save, and we load what it saves."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import TINY, assert_same_weights, build_model, tensors_on_disk
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

import glm5

# `transformers` infers the block size as rows / scale rows, which is 128 only where every side is below or a multiple
# of it (at 150 rows it dequantises wrongly), so its FP8 comparison needs such sides.
ALIGNED = dataclasses.replace(
    TINY, intermediate_size=256, hidden_size=128, qk_nope_head_dim=16, v_head_dim=16, index_head_dim=16
)


def trunk_state(model: glm5.GLM5) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}


OTHER_DTYPE = ("indexer.weights_proj.weight", "mlp.gate.weight")
"""In a bf16 model `transformers` rounds the first where we keep what the file holds, and from 5.24 on keeps the second
in fp32 where we have the published bf16 (both compute the router in fp32)."""


def assert_theirs_equals(theirs: torch.nn.Module, ours: glm5.GLM5) -> None:
    """Equal values and types; those of `OTHER_DTYPE` are equal in the narrower of the two types."""
    actual, expected = theirs.state_dict(), trunk_state(ours)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        found = actual[name]
        assert found.dtype == tensor.dtype or name.endswith(OTHER_DTYPE), name
        narrow = min(found.dtype, tensor.dtype, key=lambda dtype: dtype.itemsize)
        assert torch.equal(found.to(narrow), tensor.to(narrow)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [50_000, 5 * 10**9])
def test_transformers_loads_what_we_save(dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path) -> None:
    model = build_model(dtype=dtype)
    glm5.save_model(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in report["unexpected_keys"])
    assert theirs.dtype == dtype
    assert_theirs_equals(theirs, model)


@pytest.mark.parametrize("max_shard_size", ["50KB", "5GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_load_what_transformers_saves(
    dtype: torch.dtype, max_shard_size: str, model: glm5.GLM5, tmp_path: Path
) -> None:
    glm5.save_model(model, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "ours"), dtype=dtype)
    torch.manual_seed(5)
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    loaded = glm5.load_model(tmp_path / "theirs")
    assert loaded.config.num_nextn_predict_layers == 0
    assert_theirs_equals(theirs, loaded)
    glm5.save_model(loaded, tmp_path / "again")
    assert_same_weights(loaded, glm5.load_model(tmp_path / "again"))


def test_transformers_dequantises_our_fp8_to_the_same_weights(tmp_path: Path) -> None:
    model = build_model(ALIGNED, dtype=torch.bfloat16)
    glm5.save_model(model, tmp_path / "m", quantization="fp8")
    assert any(t.dtype == torch.float8_e4m3fn for t in tensors_on_disk(tmp_path / "m").values())
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert_theirs_equals(theirs, glm5.load_model(tmp_path / "m"))
