"""`glm5 convert SRC DST`: a model directory in another dtype or sharding, streamed tensor by tensor."""

from __future__ import annotations

import dataclasses
import json as json_text
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from glm5.checkpoint import convert_checkpoint
from glm5.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class ConvertOptions:
    """Change dtype and sharding of a model directory. The model is never whole in memory."""

    src: Annotated[Path, tyro.conf.Positional]
    """Model directory to read: BF16, FP32, FP8 or INT4, sharded or not."""
    dst: Annotated[Path, tyro.conf.Positional]
    """Directory to write; it appears when it is complete."""
    dtype: Literal["bf16", "fp32", "fp8", "int4", "int4-experts"] = "bf16"
    """Storage of the weights; fp8 quantises matrices to e4m3 blocks, int4 packs them (or those of the experts alone) in
    groups of 32 inputs, a format that only glm5 reads; the rest is bf16."""
    max_shard_size: str = "5GB"
    """Largest shard, e.g. 5GB, 500MB or 2GiB."""
    overwrite: bool = False
    """Replace a model that DST holds already, once the new one is complete."""
    json: bool = False
    """Print the result as JSON."""


def run(options: ConvertOptions) -> int:
    """Converts, showing a progress bar on the standard error stream; returns the exit status."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{options.dst.name} ({options.dtype})", total=None)
        result = convert_checkpoint(
            options.src,
            options.dst,
            options.dtype,
            max_shard_bytes=parse_size(options.max_shard_size),
            overwrite=options.overwrite,
            progress=lambda done, total: bar.update(task, advance=done, total=total),
        )
    if options.json:
        print(json_text.dumps({"directory": str(options.dst), **dataclasses.asdict(result)}))
    else:
        size = f"{result.num_bytes / 1e9:,.3f} GB"
        print(f"{options.dst}: {result.tensors:,} tensors in {result.shards:,} shard(s), {size}.")
    return 0


def parse_size(text: str) -> int:
    """ "5GB" -> 5,000,000,000 bytes; decimal and binary units. Raises `InputError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise InputError(f"{text!r} is not a size; write for example 5GB, 500MB or 2GiB.")
    return size
