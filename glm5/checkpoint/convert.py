"""`convert_checkpoint`: another dtype, another sharding, FP8 blocks or packed INT4, without a model in memory.

Each tensor goes from the source's memory map through one conversion into the new shard. FP8 that stays FP8 is copied
bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from glm5.checkpoint.checkpoint import Checkpoint
from glm5.checkpoint.names import Layout
from glm5.checkpoint.save import (
    MAX_SHARD_BYTES,
    Quantization,
    WeightSource,
    config_on_disk,
    plan_entries,
)
from glm5.checkpoint.shard_writer import write_shards
from glm5.checkpoint.staging import check_destination, check_space, staged_directory
from glm5.errors import CheckpointError

StorageDtype = Literal["bf16", "fp32", "fp8", "int4", "int4-experts"]
STORAGE: dict[StorageDtype, tuple[torch.dtype, Quantization | None]] = {
    "bf16": (torch.bfloat16, None),
    "fp32": (torch.float32, None),
    "fp8": (torch.bfloat16, "fp8"),
    "int4": (torch.bfloat16, "int4"),
    "int4-experts": (torch.bfloat16, "int4-experts"),
}
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    tensors: int
    shards: int
    num_bytes: int


@dataclass(frozen=True)
class CheckpointWeights(WeightSource):
    """The weights of a directory on disk. FP8 is dequantised in fp32; the writer rounds to the stored dtype."""

    layout: Layout
    checkpoint: Checkpoint

    def values(self, name: str) -> Tensor:
        return self.checkpoint.read(name, torch.float32)

    def fp8(self, name: str) -> Tensor:
        stored = self.checkpoint.read_fp8(name)
        return super().fp8(name) if stored is None else stored[0]

    def fp8_scale(self, name: str) -> Tensor:
        stored = self.checkpoint.read_fp8(name)
        return super().fp8_scale(name) if stored is None else stored[1]


def convert_checkpoint(
    source: Path,
    destination: Path,
    storage: StorageDtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes the model in `source` to `destination`, which appears whole or not at all.

    Files that are not weights (tokenizer, chat template, generation config, licence) are copied. `progress` hears the
    bytes of each tensor written and the bytes of all. Raises `CheckpointError`.
    """
    if destination.resolve() == source.resolve():
        raise CheckpointError(f"{source} is source and destination at once; give the result a directory of its own.")
    check_destination(destination)
    if (destination / "config.json").is_file() and not overwrite:
        raise CheckpointError(f"{destination} holds a model already; choose another directory, or pass --overwrite.")
    dtype, quantization = STORAGE[storage]
    with Checkpoint(source) as checkpoint:
        entries = plan_entries(CheckpointWeights(checkpoint.layout, checkpoint), dtype, quantization)
        total = sum(entry.num_bytes for entry in entries)
        check_space(destination, total)
        with staged_directory(destination) as stage:
            report = None if progress is None else lambda done: progress(done, total)
            shards = write_shards(stage, entries, max_shard_bytes, report)
            for path in source.iterdir():
                if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
                    shutil.copyfile(path, stage / path.name)
            config = config_on_disk(checkpoint.config, checkpoint.layout, dtype, quantization)
            (stage / "config.json").write_text(config.to_json())
    return Conversion(tensors=len(entries), shards=shards, num_bytes=total)
