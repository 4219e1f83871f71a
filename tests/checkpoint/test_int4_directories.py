"""INT4 on disk: what conversion packs, what loading widens, and what quantisation-aware training saw, are one thing."""

import copy
import json
import shutil

import pytest
import torch
from tiny_checkpoint import build_model, files, tensors_on_disk

import glm5
from glm5.checkpoint import convert_checkpoint
from glm5.errors import CheckpointError, ConfigError
from glm5.ops.quant import dequantize_int4, quantize_int4
from glm5.train.qat import quantize_aware


@pytest.fixture(params=["int4", "int4-experts"])
def storage(request) -> str:
    return request.param


def test_the_converted_model_is_the_one_that_was_trained_for(tmp_path, storage):
    """Logits of a plain model loaded from the INT4 directory equal those of the quantisation-aware forward pass."""
    model = build_model().eval()
    glm5.save_model(model, tmp_path / "full")
    convert_checkpoint(tmp_path / "full", tmp_path / storage, storage)
    loaded = glm5.load_model(tmp_path / storage, dtype=torch.float32).eval()
    aware = copy.deepcopy(model)
    names = quantize_aware(aware, "experts" if storage == "int4-experts" else "matrices", 32)
    expected = dict(model.state_dict())
    for name, value in loaded.state_dict().items():
        wanted = expected[name]
        if name in names:
            wanted = dequantize_int4(*quantize_int4(wanted), torch.float32)
        elif "correction_bias" not in name and "weights_proj" not in name:
            wanted = wanted.to(torch.bfloat16).float()  # the rest of the directory is bf16
        assert torch.equal(value, wanted), name
    for name, parameter in aware.named_parameters():
        if name not in names and "weights_proj" not in name:
            parameter.data = parameter.data.to(torch.bfloat16).float()
    ids = torch.arange(24)[None] % model.config.vocab_size
    with torch.no_grad():
        assert torch.equal(aware(ids).logits, loaded(ids).logits)
    assert not torch.equal(model(ids).logits, loaded(ids).logits)


def test_what_is_packed(tmp_path, storage):
    glm5.save_model(build_model(), tmp_path / "m", quantization=storage)
    tensors = tensors_on_disk(tmp_path / "m")
    packed = {name for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    assert packed and all(tensors[f"{name}_scale_inv"].dtype == torch.bfloat16 for name in packed)
    others = {"embed_tokens", "lm_head", "norm", "mlp.gate.", "indexer", "eh_proj"}
    assert not any(word in name for name in packed for word in others)
    assert all(".mlp.experts." in name for name in packed) == (storage == "int4-experts")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "glm5-int4", "group_size": 32}


def test_saved_directly_or_converted_are_the_same_files(tmp_path, storage):
    model = build_model()
    glm5.save_model(model, tmp_path / "full")
    convert_checkpoint(tmp_path / "full", tmp_path / "a", storage)
    glm5.save_model(model, tmp_path / "b", quantization=storage, dtype=torch.bfloat16)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    convert_checkpoint(tmp_path / "a", tmp_path / "again", storage)  # the largest code of a group is always 7
    assert files(tmp_path / "again") == files(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "fp32", "fp32")
    wide, packed = (glm5.load_model(tmp_path / name, dtype=torch.float32).state_dict() for name in ("fp32", "a"))
    assert all(torch.equal(value, packed[name]) for name, value in wide.items())


def test_damage_is_named(tmp_path):
    glm5.save_model(build_model(), tmp_path / "m", quantization="int4")

    def spoilt(**changes):
        path = tmp_path / "spoilt"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "m", path)
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] |= changes
        (path / "config.json").write_text(json.dumps(config))
        return path

    with pytest.raises(
        CheckpointError, match=r"is packed INT4, which for a matrix .* in groups of 16 .* convert it again"
    ):
        glm5.load_model(spoilt(group_size=16))
    with pytest.raises(ConfigError, match=r"group_size in quantization_config is 'x'"):
        glm5.load_model(spoilt(group_size="x"))
    with pytest.raises(ConfigError, match=r"quantization_config states 'gptq'"):
        glm5.load_model(spoilt(quant_method="gptq"))
