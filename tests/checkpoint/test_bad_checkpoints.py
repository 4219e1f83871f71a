"""Every way in which a directory can be wrong, and the sentence for it. Each case damages a copy of a good one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import glm5
from glm5.errors import CheckpointError, ConfigError, GLM5Error

INDEX = "model.safetensors.index.json"
Q_A = "model.layers.0.self_attn.q_a_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def shard_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def edit_tensors(directory: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the shard that holds `name`, and the index with it."""
    path = shard_of(directory, name)
    before = load_file(path)
    after = dict(before)
    change(after)
    save_file(after, path)

    def follow(weight_map: dict[str, str]) -> None:
        for gone in before.keys() - after.keys():
            del weight_map[gone]
        weight_map.update(dict.fromkeys(after, path.name))

    edit_index(directory, follow)


def edit_config(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Replaces one tensor."""
    return lambda directory: edit_tensors(directory, name, lambda t: t.update({name: value(t[name])}))


def rename(name: str, to: str) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, name, lambda t: t.update({to: t.pop(name)}))


def drop(name: str) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, name, lambda t: t.pop(name))


def add(name: str, value: Tensor, beside: str = Q_A) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, beside, lambda t: t.update({name: value}))


def truncate(directory: Path) -> None:
    path = shard_of(directory, EXPERT)
    path.write_bytes(path.read_bytes()[:-100])


def swap_in_index(directory: Path) -> None:
    edit_index(directory, lambda m: m.update({Q_A: m["lm_head.weight"]}))


def double(directory: Path) -> None:
    """The same tensor in two shards."""
    path = shard_of(directory, "lm_head.weight")
    save_file(load_file(path) | {Q_A: torch.zeros(40, 48)}, path)


def both_forms(directory: Path) -> None:
    add("model.layers.1.mlp.experts.gate_up_proj", torch.zeros(6, 40, 48))(directory)


def nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[2, 1], tensor[3, 0] = torch.nan, torch.inf
    return tensor


# name: (damage, options of load_model, what the sentence holds)
BF16_CASES: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "no directory": (shutil.rmtree, {}, r"is not a directory; give the directory that holds config\.json"),
    "empty directory": (
        lambda d: [p.unlink() for p in d.iterdir()], {},
        r"holds neither model\.safetensors nor model\.safetensors\.index\.json",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), {}, r"config\.json"),
    "single file and index": (
        lambda d: save_file({}, d / "model.safetensors"), {}, r"holds both .* one is stale: remove it",
    ),
    "index is not JSON": (
        lambda d: (d / INDEX).write_text("{"), {}, r"index\.json is not a weight index \(JSONDecodeError",
    ),
    "index without map": (
        lambda d: (d / INDEX).write_text("{}"), {}, r"index\.json is not a weight index \(KeyError: 'weight_map'\)",
    ),
    "index names a path": (
        lambda d: edit_index(d, lambda m: m.update({Q_A: "../other.safetensors"})), {},
        r"weight_map in .* must name one file of this directory for every tensor",
    ),
    "missing shard": (
        lambda d: shard_of(d, EXPERT).unlink(), {}, r"Shard model-\d+-of-\d+\.safetensors is missing from .*tiny",
    ),
    "truncated shard": (
        truncate, {}, r"model-\d+-of-\d+\.safetensors \([\d,]+ bytes\) is damaged or cut short .*not fully covered",
    ),
    "shard is not safetensors": (
        lambda d: shard_of(d, EXPERT).write_bytes(b"<html>"), {}, r"is damaged or cut short .*download it again",
    ),
    "index names the wrong shard": (
        swap_in_index, {}, rf"says that model-\d+\S+ holds {Q_A}, but model-00001\S+ does; fetch the index again",
    ),
    "index lists a tensor that no shard holds": (
        lambda d: edit_index(d, lambda m: m.update({Q_A + "s": m[Q_A]})), {},
        rf"holds {Q_A}s, but no shard does; .*Did you mean '{Q_A}'\?",
    ),
    "shard holds what the index does not list": (
        lambda d: edit_index(d, lambda m: m.pop(Q_A)), {}, rf"holds {Q_A}, which model\S+ does not list",
    ),
    "one tensor in two shards": (
        double, {}, rf"{Q_A} is in both model-00001\S+ and model-\d+\S+ .* remove the stale ones",
    ),
    "missing tensor": (drop(Q_A), {}, rf"lacks {Q_A}, which its config\.json calls for"),
    "missing expert": (drop(EXPERT), {}, rf"lacks {EXPERT}, which its config\.json calls for"),
    "many missing": (
        lambda d: edit_config(d, num_hidden_layers=3, indexer_types=["full"] * 3), {},
        r"lacks model\.layers\.1\.self_attn\.indexer\.\S+ \(and 4 more\)",
    ),
    "half an MTP layer": (drop("model.layers.3.eh_proj.weight"), {}, r"lacks model\.layers\.3\.eh_proj\.weight"),
    "misspelt tensor": (
        rename(Q_A, "model.layers.0.self_attn.q_a_porj.weight"), {},
        rf"model-00001\S+: model\.layers\.0\.self_attn\.q_a_porj\.weight is not a tensor .*Did you mean '{Q_A}'\?",
    ),
    "unexpected tensor": (
        add("model.layers.0.self_attn.rotary.inv_freq", torch.zeros(8)), {},
        r"model-00001\S+: model\.layers\.0\.self_attn\.rotary\.inv_freq is not a tensor of this model",
    ),
    "a layer too many": (
        lambda d: edit_config(d, num_nextn_predict_layers=0), {},
        r"model\.layers\.3\.\S+ belongs to layer 3 \(and \d+ more\), .*num_nextn_predict_layers=0; .*mtp=False",
    ),
    "adapter in the directory": (
        add("model.layers.0.self_attn.o_proj.adapter.lora_A", torch.zeros(2, 80)), {}, r"lora_A is not a tensor",
    ),
    "experts in two forms": (
        both_forms, {}, r"is there twice, for \S+ holds model\.layers\.1\.mlp\.experts\.\d\S+ too; keep one form",
    ),
    "misshapen tensor": (
        put(Q_A, lambda t: t[:-1].clone()), {},
        rf"model-00001\S+: {Q_A} has shape \[39, 48\], but config\.json makes it \[40, 48\]",
    ),
    "misshapen expert": (
        put(EXPERT, lambda t: t.T.contiguous()), {}, rf"{EXPERT} has shape \[48, 20\], but .* \[20, 48\]",
    ),
    "integer weights": (
        put(Q_A, lambda t: t.to(torch.int8)), {}, rf"{Q_A} is stored as I8; a weight must be one of F32, BF16",
    ),
    "fp8 without a scale": (
        put(Q_A, lambda t: t.to(torch.float8_e4m3fn)), {}, rf"{Q_A} is FP8, but {Q_A}_scale_inv is missing",
    ),
    "scale on a weight that is not fp8": (
        add(Q_A + "_scale_inv", torch.ones(1, 1)), {}, rf"{Q_A} is F32, yet {Q_A}_scale_inv scales it",
    ),
    "NaN on request": (
        put(EXPERT, nan), {"check_finite": True},
        rf"model-\d+\S+: {EXPERT} holds 2 NaN or infinite value\(s\), the first at \[2, 1\]; the checkpoint is damaged",
    ),
    "unknown quantization": (
        lambda d: edit_config(d, quantization_config={"quant_method": "awq"}), {},
        r"config\.json: quantization_config states 'awq' .*use the BF16 or FP8 release",
    ),
    "block size of one number": (
        lambda d: edit_config(d, quantization_config={"quant_method": "fp8", "weight_block_size": [128]}), {},
        r"config\.json: weight_block_size in quantization_config is \[128\]; it must be two whole numbers",
    ),
    "dtype that is not computed in": (
        lambda d: edit_config(d, dtype="float16"), {}, r"states dtype 'float16'; pass dtype=torch\.bfloat16",
    ),
}  # fmt: skip

CONFIG_CASES = {"no config", "unknown quantization", "block size of one number"}

FP8_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "scale lost": (drop(Q_A + "_scale_inv"), rf"{Q_A} is FP8, but {Q_A}_scale_inv is missing"),
    "weight lost": (drop(EXPERT), rf"{EXPERT}_scale_inv is a scale without its weight; fetch the shard"),
    "scale misshapen": (
        put(EXPERT + "_scale_inv", lambda t: t.repeat(2, 1)),
        rf"{EXPERT}_scale_inv is F32 \[2, 1\]; FP8 blocks of 128 x 128 need F32 \[1, 1\]",
    ),
    "scale of integers": (put(Q_A + "_scale_inv", lambda t: t.int()), rf"{Q_A}_scale_inv is I32 \[1, 1\]; FP8 blocks"),
    "other block size": (
        lambda d: edit_config(d, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]}),
        r"FP8 blocks of 16 x 16 need F32 \[\d+, \d+\]: correct weight_block_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BF16_CASES)
def test_bad_directory(case: str, saved: Path, tmp_path: Path) -> None:
    damage, options, sentence = BF16_CASES[case]
    directory = Path(shutil.copytree(saved, tmp_path / "tiny"))
    damage(directory)
    with pytest.raises(GLM5Error, match=sentence) as caught:
        glm5.load_model(directory, **options)
    assert isinstance(caught.value, ConfigError if case in CONFIG_CASES else CheckpointError)


@pytest.mark.parametrize("case", FP8_CASES)
def test_bad_fp8_directory(case: str, saved_fp8: Path, tmp_path: Path) -> None:
    damage, sentence = FP8_CASES[case]
    directory = Path(shutil.copytree(saved_fp8, tmp_path / "tiny-fp8"))
    damage(directory)
    with pytest.raises(CheckpointError, match=sentence):
        glm5.load_model(directory)


def test_the_undamaged_copies_load(saved: Path, saved_fp8: Path) -> None:
    glm5.load_model(saved, check_finite=True)
    glm5.load_model(saved_fp8, check_finite=True)


def test_infinity_is_let_through_when_nobody_asks(saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "tiny"))
    put(EXPERT, nan)(directory)
    assert glm5.load_model(directory).state_dict()["model.layers.1.mlp.experts.gate_up_proj"].isinf().any()
