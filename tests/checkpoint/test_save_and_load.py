"""What is saved comes back in every dtype, sharding and form of names; expert checksums survive all of it."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import TINY, assert_same_weights, build_model, checksum, files, tensors_on_disk

import glm5
from glm5.checkpoint.names import stored_as_fp8
from glm5.checkpoint.shard_writer import Entry, plan_shards
from glm5.errors import CheckpointError, InputError


def expert_checksums_in_model(model: glm5.GLM5) -> dict[str, str]:
    """One digest per expert from the stacked tensors, sliced here by hand."""
    sums = {}
    for name, gate_up in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            down = model.state_dict()[name.replace("gate_up_proj", "down_proj")]
            width = gate_up.shape[1] // 2
            stem = name.removesuffix("gate_up_proj").replace("mtp.0.", "model.layers.3.")
            for e in range(gate_up.shape[0]):
                sums[f"{stem}{e}"] = checksum(gate_up[e, :width], gate_up[e, width:], down[e])
    return sums


def expert_checksums_on_disk(directory: Path) -> dict[str, str]:
    tensors = tensors_on_disk(directory)
    stems = {n.removesuffix(".gate_proj.weight") for n in tensors if ".experts." in n and "gate_proj" in n}
    return {s: checksum(*(tensors[f"{s}.{p}_proj.weight"] for p in ("gate", "up", "down"))) for s in stems}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 5 * 10**9])
def test_round_trip_is_exact(dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path) -> None:
    model = build_model(dtype=dtype)
    glm5.save_model(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    loaded = glm5.load_model(tmp_path / "m", check_finite=True)
    assert_same_weights(model, loaded)
    assert loaded.config == dataclasses.replace(TINY, dtype=str(dtype).removeprefix("torch."))
    assert all(p.requires_grad for p in loaded.parameters())
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_every_expert_survives_saving_resharding_and_loading(model: glm5.GLM5, saved: Path, tmp_path: Path) -> None:
    expected = expert_checksums_in_model(model)
    assert len(expected) == 3 * 6 and len(set(expected.values())) == 3 * 6
    assert expert_checksums_on_disk(saved) == expected
    glm5.save_model(glm5.load_model(saved), tmp_path / "other", max_shard_bytes=7_000)
    assert expert_checksums_on_disk(tmp_path / "other") == expected
    assert expert_checksums_in_model(glm5.load_model(tmp_path / "other")) == expected


def test_index_lists_every_tensor_and_the_total_size(saved: Path) -> None:
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    tensors = tensors_on_disk(saved)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(p.name for p in saved.glob("*.safetensors")) and len(shards) > 5
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"


def test_shards_stay_below_the_limit_in_order() -> None:
    sizes = [5, 5, 5, 30, 1, 9, 1]
    entries = [Entry(str(i), torch.uint8, (n,), torch.Tensor) for i, n in enumerate(sizes)]
    shards = [[int(e.name) for e in shard] for shard in plan_shards(entries, 10)]
    assert shards == [[0, 1], [2], [3], [4, 5], [6]]


def test_bf16_keeps_the_router_bias_and_indexer_weights_in_fp32(model: glm5.GLM5, tmp_path: Path) -> None:
    glm5.save_model(model, tmp_path / "m", dtype=torch.bfloat16)
    for name, tensor in tensors_on_disk(tmp_path / "m").items():
        wide = name.endswith(("e_score_correction_bias", "weights_proj.weight"))
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
    loaded = glm5.load_model(tmp_path / "m").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name


def test_load_converts_to_the_dtype_asked_for(saved: Path, model: glm5.GLM5) -> None:
    loaded = glm5.load_model(saved, torch.bfloat16)
    assert loaded.config.dtype == "bfloat16"
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    with pytest.raises(InputError, match="float16"):
        glm5.load_model(saved, torch.float16)


@pytest.mark.parametrize("sharded", [False, True])
def test_stacked_names_and_single_files_load(model: glm5.GLM5, saved: Path, tmp_path: Path, sharded: bool) -> None:
    state = {n.replace("mtp.0.", "model.layers.3."): t.clone() for n, t in model.state_dict().items()}
    shutil.copy(saved / "config.json", tmp_path)
    if sharded:
        halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
        weight_map = {}
        for i, half in enumerate(halves):
            save_file(half, tmp_path / f"part-{i}.safetensors")
            weight_map.update(dict.fromkeys(half, f"part-{i}.safetensors"))
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(state, tmp_path / "model.safetensors")
    assert_same_weights(model, glm5.load_model(tmp_path))


def test_mtp_layers_are_optional(
    model: glm5.GLM5, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trunk = {n: t for n, t in tensors_on_disk(saved).items() if not n.startswith("model.layers.3.")}
    shutil.copy(saved / "config.json", tmp_path)
    save_file(trunk, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        without = glm5.load_model(tmp_path)
    assert "holds no MTP layer" in caplog.text
    caplog.clear()
    unwanted = glm5.load_model(saved, mtp=False)
    assert not caplog.text
    for loaded in (without, unwanted):
        assert loaded.config.num_nextn_predict_layers == 0 and len(loaded.mtp) == 0
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_copies_of_shared_tensors_under_the_mtp_layer_are_skipped(
    model: glm5.GLM5, saved: Path, tmp_path: Path
) -> None:
    tensors = tensors_on_disk(saved)
    tensors["model.layers.3.embed_tokens.weight"] = torch.zeros(160, 48)
    tensors["model.layers.3.shared_head.head.weight"] = torch.zeros(160, 48)
    shutil.copy(saved / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_weights(model, glm5.load_model(tmp_path))


# ---- FP8 ------------------------------------------------------------------------------------------------------------
def dequantise_by_hand(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    result = weight.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            result[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scale[i, j]
    return result


def test_fp8_directory_holds_what_a_plain_loop_gives_back(saved_fp8: Path) -> None:
    tensors = tensors_on_disk(saved_fp8)
    loaded = glm5.load_model(saved_fp8)
    assert loaded.config.quantization_config is None and loaded.lm_head.weight.dtype == torch.bfloat16
    quantised = [n for n in tensors if n + "_scale_inv" in tensors]
    assert quantised and all(stored_as_fp8(n) and tensors[n].dtype == torch.float8_e4m3fn for n in quantised)
    state = loaded.state_dict()
    for e in range(6):
        parts = [f"model.layers.2.mlp.experts.{e}.{p}_proj.weight" for p in ("gate", "up", "down")]
        gate, up, down = (dequantise_by_hand(tensors[n], tensors[n + "_scale_inv"]).bfloat16() for n in parts)
        assert torch.equal(state["model.layers.2.mlp.experts.gate_up_proj"][e], torch.cat([gate, up]))
        assert torch.equal(state["model.layers.2.mlp.experts.down_proj"][e], down)
    name = "model.layers.0.mlp.gate_proj.weight"  # 150 x 48: a whole and a partial block
    assert tensors[name + "_scale_inv"].shape == (2, 1)
    assert torch.equal(state[name], dequantise_by_hand(tensors[name], tensors[name + "_scale_inv"]).bfloat16())


def test_fp8_stays_within_its_rounding_error(model: glm5.GLM5, saved_fp8: Path) -> None:
    loaded = glm5.load_model(saved_fp8, torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        error = (loaded[name] - tensor).abs().max() / tensor.abs().max()
        assert error < 0.04, name


def test_fp8_config_says_what_the_files_hold(saved_fp8: Path) -> None:
    stated = json.loads((saved_fp8 / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "fp8" and stated["fmt"] == "e4m3" and stated["activation_scheme"] == "dynamic"
    assert stated["weight_block_size"] == [128, 128]
    tensors = tensors_on_disk(saved_fp8)
    wide = {n.removesuffix(".weight") for n, t in tensors.items() if t.ndim == 2 and t.dtype == torch.bfloat16}
    wide |= {n.removesuffix(".weight") for n in tensors if n.endswith("weights_proj.weight")}
    assert set(stated["modules_to_not_convert"]) == wide


def test_stacked_fp8_experts_and_other_block_sizes_load(saved: Path, tmp_path: Path) -> None:
    """Stacked e4m3 with [experts, ...] scales, in blocks of 16 x 32, dequantised one expert at a time."""
    tensors = tensors_on_disk(saved)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    codes = torch.randint(0, 127, (6, 40, 48), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(6, 3, 2)
    tensors = {n: t for n, t in tensors.items() if "layers.1.mlp.experts" not in n or "down_proj" in n}
    tensors |= {name: codes, name + "_scale_inv": scale}
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = glm5.load_model(tmp_path, torch.float32).state_dict()[name]
    for e, row, column in [(0, 0, 0), (3, 17, 33), (5, 39, 47), (2, 20, 31)]:
        expected = codes[e, row, column].float() * scale[e, row // 16, column // 32]
        assert loaded[e, row, column] == expected


# ---- the directory --------------------------------------------------------------------------------------------------
class Notebook:
    """A tokenizer as `save_model` sees it."""

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


def test_directory_holds_config_generation_config_and_tokenizer(model: glm5.GLM5, tmp_path: Path) -> None:
    glm5.save_model(model, tmp_path / "a", Notebook())
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
    }
    glm5.save_model(model, tmp_path / "b", generation_config={"temperature": 1.0})
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"temperature": 1.0}
    assert glm5.ModelConfig.from_pretrained(tmp_path / "a") == TINY


def test_saving_over_a_model_replaces_weights_and_keeps_the_rest(tmp_path: Path) -> None:
    glm5.save_model(build_model(seed=1), tmp_path / "m", Notebook(), max_shard_bytes=20_000)
    (tmp_path / "m" / "README.md").write_text("a model card")
    (tmp_path / "m" / "notes").mkdir()
    (tmp_path / "m" / "notes" / "a.txt").write_text("kept")
    second = build_model(seed=2)
    glm5.save_model(second, tmp_path / "m")
    assert_same_weights(second, glm5.load_model(tmp_path / "m"))
    assert files(tmp_path / "m").keys() == {
        "README.md", "notes/a.txt", "tokenizer.json", "config.json", "generation_config.json",
        "model-00001-of-00001.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_unmerged_adapters_are_refused(tmp_path: Path) -> None:
    from glm5.model import add_adapters, merge_adapters

    model = build_model()
    add_adapters(model, rank=2)
    with pytest.raises(CheckpointError, match="merge the adapters into the weights first"):
        glm5.save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    merge_adapters(model)
    glm5.save_model(model, tmp_path / "m")
    assert_same_weights(model, glm5.load_model(tmp_path / "m"))
