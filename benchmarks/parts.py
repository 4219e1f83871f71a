"""Where the time of a decode step goes, by part and context, and how near the indexer comes to the machine's limits.

    python -m benchmarks.parts [--contexts 8192 200000] [--batch 1] [--threads 1] [--clock cpu] [--storage bf16]
                               [--index-heads 32 --index-width 128 --index-topk 2048] [--json]

One new token of each of `batch` sequences over a paged cache of random rows, by the decoder; blocks are shuffled.
"selection" is the indexer's scores and top-k, "attention" reads the selected latents, "linear" is every product with
an attention or output weight, "experts" the feed-forward layers. Milliseconds of a step: the median of the repeats
after a warm-up, with the lowest. Measured in turn with the steps:

- the memory's speed: `torch.dot` over two arrays of 128 MB (fp32); the indexer reads `context` rows of keys in every
  full-indexer layer, and its share of that speed is what the last column shows;
- the speed of products: `torch.mm` of 1024 x 1024 in fp32 and in bf16. "limit" is how fast the indexer could read keys
  if it did nothing but its `heads * width` multiply-adds a key at that speed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import glm5
from benchmarks.measure import machine, timed
from glm5.engine.paged_cache import PagedCache
from glm5.engine.pool import Storage
from glm5.engine.runner import Chunk, Runner
from glm5.model import decode, initialize_

PARTS = {
    "selection": ("select",),
    "attention": ("attend",),
    "linear": ("linear", "combine_heads", "split_heads"),
    "experts": ("route", "experts", "swiglu"),
}


@dataclass(frozen=True)
class Options:
    """Defaults: `nano`, one sequence, one thread."""

    preset: str = "nano"
    storage: Storage = "fp32"
    """Of the cache."""
    index_heads: int | None = None
    """Heads of the indexer; None: the preset's, as in the next two."""
    index_width: int | None = None
    index_topk: int | None = None
    contexts: tuple[int, ...] = (8192, 32768, 200_000)
    batch: int = 1
    repeats: int = 50
    threads: int = 1
    clock: Literal["wall", "cpu"] = "wall"
    """"cpu" counts the processor's seconds of all threads: on a busy machine the more telling clock."""
    json: bool = False
    """Print JSON instead of a table."""


@contextmanager
def clocked(spent: dict[str, float], clock: Callable[[], float]) -> Iterator[None]:
    """Adds the seconds of every part of a decoder's steps to `spent`."""
    kept = {name: getattr(decode.do, name) for names in PARTS.values() for name in names}

    def count(part: str, call: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any, **named: Any) -> None:
            start = clock()
            call(*arguments, **named)
            spent[part] = spent.get(part, 0.0) + clock() - start

        return run

    try:
        for part, names in PARTS.items():
            for name in names:
                setattr(decode.do, name, count(part, kept[name]))
        yield
    finally:
        for name, call in kept.items():
            setattr(decode.do, name, call)


def stepper(
    model: glm5.GLM5, context: int, batch: int, storage: Storage = "fp32"
) -> tuple[Callable[[], object], PagedCache]:
    """A decode step of `batch` sequences whose caches hold `context - 1` random rows each, and the cache."""
    size = 64
    blocks = -(-context // size)
    cache = PagedCache(model.config, num_blocks=blocks * batch, block_size=size, storage=storage)
    for pool in (*cache.latents.values(), *cache.keys.values()):
        for slots_N in torch.arange(blocks * batch * size).split(1 << 16):
            pool.write(slots_N, torch.randn(len(slots_N), pool.width))
    tables = torch.randperm(blocks * batch).split(blocks)
    chunks = [Chunk([7], context - 1, table.tolist(), 1) for table in tables]
    runner = Runner(model, cache)
    return (lambda: runner.run(chunks)), cache


def time_parts(
    model: glm5.GLM5,
    context: int,
    batch: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    storage: Storage = "fp32",
) -> dict[str, Any]:
    """Milliseconds of a step and of its parts (median, lowest), and the indexer's speed against the machine's."""
    step, cache = stepper(model, context, batch, storage)
    x, y = torch.randn(1 << 25), torch.randn(1 << 25)
    squares = {"fp32": torch.randn(1024, 1024), "bf16": torch.randn(1024, 1024, dtype=torch.bfloat16)}
    runs: dict[str, list[float]] = {name: [] for name in (*PARTS, "step", "memory", *squares)}
    for _ in range(repeats + 2):
        spent: dict[str, float] = {}
        with clocked(spent, clock):
            runs["step"].append(timed(step, clock))
        for part in PARTS:
            runs[part].append(spent.get(part, 0.0))
        runs["memory"].append(timed(lambda: torch.dot(x, y), clock))
        for name, square in squares.items():
            runs[name].append(timed(partial(torch.mm, square, square), clock))
    ms = {name: {"median": statistics.median(r[2:]) * 1e3, "lowest": min(r[2:]) * 1e3} for name, r in runs.items()}
    width, key_bytes = model.config.index_head_dim, next(iter(cache.keys.values())).bytes_per_row
    keys = batch * context * len(cache.keys)
    speed = {which: keys * key_bytes / ms["selection"][which] / 1e6 for which in ("median", "lowest")}
    memory = {which: 8 * x.numel() / ms["memory"][which] / 1e6 for which in ("median", "lowest")}
    products = model.config.index_n_heads * width  # of a key
    limit = {name: 1024**3 / ms[name]["lowest"] / products * key_bytes / 1e6 for name in squares}
    share = {which: speed[which] / memory[which] for which in speed}
    return {
        "context": context, "batch": batch, "ms": ms, "index_gb_s": speed, "memory_gb_s": memory, "share": share,
        "limit_gb_s": limit,
    }  # fmt: skip


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    asked = {
        "index_n_heads": options.index_heads, "index_head_dim": options.index_width, "index_topk": options.index_topk,
    }  # fmt: skip
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    config = replace(glm5.ModelConfig.from_preset(options.preset), **changes)
    model = glm5.GLM5(config, dtype=torch.float32).eval()
    initialize_(model, 0.05, seed=0)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    results = [
        time_parts(model, context, options.batch, options.repeats, clock, options.storage)
        for context in options.contexts
    ]
    if options.json:
        print(json.dumps({"machine": machine(), "options": vars(options), "results": results}, indent=1))
        return
    names = ("step", *PARTS)
    table = Table("context", *(f"{name}, ms" for name in names), "indexer, GB/s", "memory, GB/s",
                  "limit fp32, bf16", "share of memory")  # fmt: skip
    for result in results:
        cells = ["{median:.3f} ({lowest:.3f})".format(**result["ms"][name]) for name in names]
        speeds = ["{median:.1f} ({lowest:.1f})".format(**result[name]) for name in ("index_gb_s", "memory_gb_s")]
        limit = "{fp32:.1f}, {bf16:.1f}".format(**result["limit_gb_s"])
        table.add_row(f"{result['context']:,}", *cells, *speeds, limit, f"{result['share']['lowest']:.0%}")
    Console(width=190).print(table)
    Console().print(machine())


if __name__ == "__main__":
    main()
