"""`glm5 convert`: dtype and sharding change, weights do not; FP8 that stays FP8 is copied bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import assert_same_weights, build_model, files, tensors_on_disk

import glm5
from glm5.checkpoint import convert_checkpoint
from glm5.cli.convert import ConvertOptions, parse_size, run
from glm5.errors import CheckpointError, InputError


def test_resharding_keeps_every_bit(model: glm5.GLM5, saved: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = convert_checkpoint(
        saved, tmp_path / "m", "fp32", max_shard_bytes=9_000, progress=lambda *step: seen.append(step)
    )
    assert_same_weights(model, glm5.load_model(tmp_path / "m"))
    assert result.shards == len(list((tmp_path / "m").glob("*.safetensors"))) > len(list(saved.glob("*.safetensors")))
    assert sum(done for done, _ in seen) == result.num_bytes and {total for _, total in seen} == {result.num_bytes}


def test_conversion_equals_loading_and_saving(model: glm5.GLM5, saved: Path, saved_fp8: Path, tmp_path: Path) -> None:
    convert_checkpoint(saved, tmp_path / "bf16", "bf16")
    glm5.save_model(model, tmp_path / "bf16-saved", dtype=torch.bfloat16)
    assert files(tmp_path / "bf16") == files(tmp_path / "bf16-saved")
    convert_checkpoint(saved, tmp_path / "fp8", "fp8", max_shard_bytes=30_000)
    assert files(tmp_path / "fp8") == files(saved_fp8)
    convert_checkpoint(saved_fp8, tmp_path / "back", "bf16")
    assert_same_weights(glm5.load_model(saved_fp8), glm5.load_model(tmp_path / "back"))


def test_fp8_to_fp8_is_copied_and_not_quantised_again(saved_fp8: Path, tmp_path: Path) -> None:
    convert_checkpoint(saved_fp8, tmp_path / "m", "fp8")
    before, after = tensors_on_disk(saved_fp8), tensors_on_disk(tmp_path / "m")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name


def test_other_files_go_along_and_weights_do_not(saved: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(saved, tmp_path / "source"))
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "old.bin"):
        (source / name).write_text(name)
    convert_checkpoint(source, tmp_path / "m", "bf16")
    assert files(tmp_path / "m").keys() == {
        "tokenizer.json", "chat_template.jinja", "LICENSE", "config.json", "generation_config.json",
        "model-00001-of-00001.safetensors", "model.safetensors.index.json",
    }  # fmt: skip


def test_source_and_occupied_destinations_are_safe(saved: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(saved, tmp_path / "source"))
    before = files(source)
    with pytest.raises(CheckpointError, match="source and destination at once"):
        convert_checkpoint(source, tmp_path / "x" / ".." / "source", "bf16", overwrite=True)
    other = tmp_path / "other"
    glm5.save_model(build_model(seed=4), other)
    with pytest.raises(CheckpointError, match=r"holds a model already; .*--overwrite"):
        convert_checkpoint(source, other, "bf16")
    convert_checkpoint(source, other, "fp32", overwrite=True)
    assert_same_weights(glm5.load_model(source), glm5.load_model(other))
    assert files(source) == before


def test_a_bad_source_leaves_no_destination(saved: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(saved, tmp_path / "source"))
    next(source.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        convert_checkpoint(source, tmp_path / "m", "bf16")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_command_line_prints_what_it_wrote(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ConvertOptions(saved, tmp_path / "a", dtype="fp8", max_shard_size="40KB")) == 0
    shards = len(list((tmp_path / "a").glob("*.safetensors")))
    assert f"in {shards} shard(s)" in capsys.readouterr().out
    assert run(ConvertOptions(saved, tmp_path / "b", json=True)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["shards"] == 1 and printed["tensors"] == len(tensors_on_disk(tmp_path / "b"))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("17", 17), ("3b", 3), ("2k", 2000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "5XB", "five"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(InputError, match="is not a size; write for example 5GB"):
        parse_size(text)
