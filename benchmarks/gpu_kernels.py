"""The engine's Triton kernels against its PyTorch operators on this GPU, in one run; needs a CUDA GPU from sm_80 on.

    python -m benchmarks.gpu_kernels [--shape glm-5] [--sequences 16] [--json] [--out FILE]

One layer of a decoding step as the engine asks for it (`engine/views.py`), with the kernels and without, and the choice
of a prompt's last chunk:

- select: the indexer's `index_topk` keys of one new token of every sequence, from scores to slots;
- attend: absorbed attention of the same tokens over `index_topk` slots each;
- prompt: the choice of `--chunk` tokens at the end of one context.

Both sides are timed in turn, launches and the wait for the GPU included; times and ratios are medians with the lowest
and highest. GB/s counts what must be read once (the keys of every context, the chosen latents), and the share is that
of the memory bandwidth that copying 1 GiB reaches in this run. `differs` is the largest difference of an output, or the
share of choices that the other side did not make (sums in another order may exchange keys of almost equal scores).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

import glm5
from benchmarks.measure import Spread, alternate, machine, ratios
from glm5.engine.paged_cache import PagedCache
from glm5.engine.pool import Storage
from glm5.engine.views import BatchView, Run, SequenceView
from glm5.ops import gpu

NEEDS = "benchmarks.gpu_kernels needs a CUDA GPU from sm_80 on and Triton (`pip install 'glm5[gpu]'`); this machine has"
PAGE = 64


@dataclass(frozen=True)
class Options:
    """Defaults: GLM-5's widths in bf16."""

    shape: Literal["glm-5", "nano"] = "glm-5"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the model."""
    storages: tuple[Storage, ...] = ("bf16", "fp8")
    contexts: tuple[int, ...] = (8192, 65536, 131072)
    sequences: int = 16
    """That decode together, each with a context of its own."""
    chunk: int = 2048
    """Tokens of a prompt that choose at once; 0 leaves them out."""
    repeats: int = 20
    json: bool = False
    """Print JSON instead of a table."""
    out: Path | None = None
    """Write the JSON there too."""


@dataclass(frozen=True)
class Row:
    """One operation; times in milliseconds as (lowest, median, highest)."""

    name: str
    storage: str
    context: int
    kernels_ms: tuple[float, float, float]
    pytorch_ms: tuple[float, float, float]
    times_faster: tuple[float, float, float]
    gigabytes_per_second: float
    share_of_bandwidth: float
    differs: float


@dataclass(frozen=True)
class Case:
    """An operation with the kernels and without, the bytes that it must read, and how far two outputs are apart."""

    name: str
    fast: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    bytes: int
    differs: Callable[[Tensor, Tensor], float]


def missing() -> str | None:
    """What this machine lacks."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return None if gpu.runs_on(torch.device("cuda")) else "a GPU or a setting that they are not made for"


def widest_gap(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def other_choices(a_1TK: Tensor, b_1TK: Tensor) -> float:
    """Share of the choices of a that b did not make."""
    rows = zip(a_1TK[0], b_1TK[0], strict=True)
    return statistics.mean(float((~torch.isin(a_K, b_K)).float().mean()) for a_K, b_K in rows)


def one_layer(preset: str) -> glm5.ModelConfig:
    """A preset's widths."""
    return replace(
        glm5.ModelConfig.from_preset(preset), num_hidden_layers=1, num_nextn_predict_layers=0,
        first_k_dense_replace=1, mlp_layer_types=(), indexer_types=(),
    )  # fmt: skip


def filled_cache(config: glm5.ModelConfig, options: Options, storage: Storage, tokens: int, device: str) -> PagedCache:
    """A cache of one layer whose pools hold random rows."""
    cache = PagedCache(
        config, num_blocks=-(-tokens // PAGE), block_size=PAGE, dtype=getattr(torch, options.dtype), device=device,
        storage=storage,
    )  # fmt: skip
    for pool in (cache.latents[0], cache.keys[0]):
        for slots_N in torch.arange(len(pool.rows_XW), device=device).split(1 << 16):
            pool.write(slots_N, torch.randn(len(slots_N), pool.width, device=device))
    return cache


def cases(options: Options, storage: Storage, context: int, device: str, kernels: gpu.Kernels) -> Iterator[Case]:
    """What is measured at one context."""
    c, count, dtype = one_layer(options.shape), options.sequences, getattr(torch, options.dtype)
    cache = filled_cache(c, options, storage, count * (-(-context // PAGE)) * PAGE, device)
    tables = torch.randperm(cache.num_blocks).view(count, -1).tolist()
    random = lambda *shape: torch.randn(1, *shape, device=device).to(dtype)
    runs = [Run(1, context - 1, table) for table in tables]
    fast, plain = BatchView(cache, runs, kernels), BatchView(cache, runs)
    q_1NHI, w_1NH = random(count, c.index_n_heads, c.index_head_dim), random(count, c.index_n_heads).float()
    q_1NHC = random(count, c.num_attention_heads, c.kv_lora_rank + c.qk_rope_head_dim)
    spans = plain.reserve(1, count, None, None)
    select = lambda view: some(view.select(0, q_1NHI, w_1NH, spans, c.index_topk))
    chosen_1NK = select(plain)
    attend = lambda view: view.attend(0, q_1NHC, chosen_1NK, c.kv_lora_rank, c.qk_head_dim**-0.5)
    key_bytes, latent_bytes = cache.keys[0].bytes_per_row, cache.latents[0].bytes_per_row
    yield Case("select", partial(select, fast), partial(select, plain), count * context * key_bytes, other_choices)
    yield Case("attend", partial(attend, fast), partial(attend, plain), chosen_1NK.numel() * latent_bytes, widest_gap)
    if not options.chunk:
        return
    chunk = min(options.chunk, context)
    run = Run(chunk, context - chunk, tables[0])
    q_1THI, w_1TH = random(chunk, c.index_n_heads, c.index_head_dim), random(chunk, c.index_n_heads).float()

    def prompt(kernels: gpu.Kernels | None) -> Tensor:
        view = SequenceView(cache, run, kernels)
        return some(view.select(0, q_1THI, w_1TH, view.reserve(1, chunk, None, None), c.index_topk))

    yield Case("prompt", partial(prompt, kernels), partial(prompt, None), context * key_bytes, other_choices)


def some(chosen: Tensor | None) -> Tensor:
    """A choice; there is none where a context is no longer than `index_topk`."""
    if chosen is None:
        sys.exit("Every context must be longer than the model's index_topk; give longer --contexts.")
    return chosen


def bandwidth(device: str, repeats: int, size: int = 1 << 30) -> float:
    """Bytes per second of copying, read and written."""
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / alternate({"copy": waited(lambda: b.copy_(a), device)}, repeats)["copy"].median


def waited(call: Callable[[], object], device: str) -> Callable[[], object]:
    """A call that ends when the GPU is done."""

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def milliseconds(spread: Spread) -> tuple[float, float, float]:
    return 1e3 * min(spread.runs), 1e3 * spread.median, 1e3 * max(spread.runs)


@torch.inference_mode()
def measure(options: Options, kernels: gpu.Kernels, device: str, bytes_per_second: float) -> Iterator[Row]:
    """Every operation, format and context."""
    for storage in options.storages:
        for context in options.contexts:
            torch.manual_seed(0)
            for case in cases(options, storage, context, device, kernels):
                differs = case.differs(case.fast(), case.plain())
                sides = {"kernels": waited(case.fast, device), "pytorch": waited(case.plain, device)}
                found = alternate(sides, options.repeats, warmup=3)
                rate = case.bytes / found["kernels"].median
                yield Row(
                    case.name, storage, context, milliseconds(found["kernels"]), milliseconds(found["pytorch"]),
                    ratios(found["kernels"], found["pytorch"]), rate / 1e9, rate / bytes_per_second, differs,
                )  # fmt: skip


def table(rows: list[Row], title: str) -> Table:
    made = Table(
        "operation", "cache", "context", "kernels, ms", "PyTorch, ms", "faster by", "GB/s", "of bandwidth", "differs",
        title=title,
    )  # fmt: skip
    spread = lambda values, unit="": f"{values[1]:.2f}{unit} ({values[0]:.2f} - {values[2]:.2f})"
    for row in rows:
        made.add_row(
            row.name, row.storage, f"{row.context:,}", spread(row.kernels_ms), spread(row.pytorch_ms),
            spread(row.times_faster, "x"), f"{row.gigabytes_per_second:,.0f}", f"{row.share_of_bandwidth:.0%}",
            f"{row.differs:.2g}",
        )  # fmt: skip
    return made


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    lacks = missing()
    if lacks is not None:
        sys.exit(f"{NEEDS} {lacks}.")
    device = "cuda"
    config = glm5.ModelConfig.from_preset(options.shape)
    kernels = gpu.kernels(config, getattr(torch, options.dtype), torch.device(device))
    assert kernels is not None
    bytes_per_second = bandwidth(device, options.repeats)
    rows = list(measure(options, kernels, device, bytes_per_second))
    gpu_name = torch.cuda.get_device_name()
    result = {
        "machine": {**machine(), "gpu": gpu_name, "copy_bytes_per_second": bytes_per_second},
        "options": {**asdict(options), "out": None}, "results": [asdict(row) for row in rows],
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        Console().print(
            table(rows, f"{options.shape} on {gpu_name}, which copies at {bytes_per_second / 1e9:,.0f} GB/s")
        )


if __name__ == "__main__":
    main()
