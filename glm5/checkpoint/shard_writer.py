"""Writing safetensors shards one tensor at a time.

The library writes a file from a dictionary of tensors that are all in memory. Here sizes are known before values, so
the header goes first and every tensor is made, written and forgotten: peak memory is one tensor, whatever the shard.
Format (https://huggingface.co/docs/safetensors): length of the header as 8 little-endian bytes, header as JSON, data
without holes. Wide elements go first, so that every tensor starts at a multiple of its element size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm5.checkpoint.tensor_files import FLOAT_DTYPES, INDEX_FILE, PACKED_DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in (FLOAT_DTYPES | PACKED_DTYPES).items()}


@dataclass(frozen=True)
class Entry:
    """One tensor to write. `make` is called when its turn comes and returns it on any device, in this dtype."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the data on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Entries in their order, split where a shard would pass `max_shard_bytes` (a larger tensor stands alone)."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    return shards


def write_shards(
    directory: Path, entries: Sequence[Entry], max_shard_bytes: int, progress: Callable[[int], None] | None = None
) -> int:
    """Writes shards and their index into `directory`; `progress` hears the bytes of each tensor. Returns the number."""
    shards = plan_shards(entries, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, shard, progress)
        weight_map.update({entry.name: file for entry in shard})
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for entry in entries)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return len(shards)


def _write_shard(path: Path, entries: Sequence[Entry], progress: Callable[[int], None] | None) -> None:
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        end = offset + entry.num_bytes
        dtype = _DTYPE_NAMES[entry.dtype]
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            tensor = entry.make()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise AssertionError(
                    f"{entry.name}: planned {entry.dtype} {entry.shape}, made {tensor.dtype} {tensor.shape}"
                )
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress(entry.num_bytes)
