"""Where the time of a decode step goes, by part and context, and how near the indexer comes to the memory's speed.

    python -m benchmarks.parts [--contexts 8192 200000] [--batch 1] [--threads 1] [--clock cpu] [--json]

One new token of each of `batch` sequences over a paged fp32 cache of random rows, by the decoder; blocks are shuffled.
"selection" is the indexer's scores and top-k, "attention" reads the selected latents, "linear" is every product with
an attention or output weight, "experts" the feed-forward layers. Milliseconds of a step: the median of the repeats
after a warm-up, with the lowest. The memory's speed is that of `torch.dot` over two arrays of 128 MB (fp32), measured
in turn with the steps; the indexer reads `context * index_head_dim * 4` bytes in every full-indexer layer.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import glm5
from benchmarks.measure import machine, timed
from glm5.engine.paged_cache import PagedCache
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
        def run(*arguments: Any) -> None:
            start = clock()
            call(*arguments)
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


def stepper(model: glm5.GLM5, context: int, batch: int) -> Callable[[], object]:
    """A decode step of `batch` sequences whose caches hold `context - 1` random rows each."""
    size = 64
    blocks = -(-context // size)
    cache = PagedCache(model.config, num_blocks=blocks * batch, block_size=size)
    for pool in (*cache.latents.values(), *cache.keys.values()):
        pool.rows_XW.normal_()
    tables = torch.randperm(blocks * batch).split(blocks)
    chunks = [Chunk([7], context - 1, table.tolist(), 1) for table in tables]
    runner = Runner(model, cache)
    return lambda: runner.run(chunks)


def time_parts(
    model: glm5.GLM5, context: int, batch: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Milliseconds of a step and of its parts (median, lowest), and the indexer's speed against the memory's."""
    step = stepper(model, context, batch)
    x, y = torch.randn(1 << 25), torch.randn(1 << 25)
    runs: dict[str, list[float]] = {name: [] for name in (*PARTS, "step", "memory")}
    for _ in range(repeats + 2):
        spent: dict[str, float] = {}
        with clocked(spent, clock):
            runs["step"].append(timed(step, clock))
        for part in PARTS:
            runs[part].append(spent.get(part, 0.0))
        runs["memory"].append(timed(lambda: torch.dot(x, y), clock))
    ms = {name: {"median": statistics.median(r[2:]) * 1e3, "lowest": min(r[2:]) * 1e3} for name, r in runs.items()}
    layers = sum(kind == "full" for kind in model.config.indexer_types)
    read = batch * context * model.config.index_head_dim * 4 * layers
    speed = {which: read / ms["selection"][which] / 1e6 for which in ("median", "lowest")}
    memory = {which: 8 * x.numel() / ms["memory"][which] / 1e6 for which in ("median", "lowest")}
    share = {which: speed[which] / memory[which] for which in speed}
    return {"context": context, "batch": batch, "ms": ms, "index_gb_s": speed, "memory_gb_s": memory, "share": share}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = glm5.GLM5(glm5.ModelConfig.from_preset(options.preset), dtype=torch.float32).eval()
    initialize_(model, 0.05, seed=0)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    results = [time_parts(model, context, options.batch, options.repeats, clock) for context in options.contexts]
    if options.json:
        print(json.dumps({"machine": machine(), "options": vars(options), "results": results}, indent=1))
        return
    names = ("step", *PARTS)
    table = Table("context", *(f"{name}, ms" for name in names), "indexer, GB/s", "memory, GB/s", "share")
    for result in results:
        cells = ["{median:.3f} ({lowest:.3f})".format(**result["ms"][name]) for name in names]
        speeds = ["{median:.1f} ({lowest:.1f})".format(**result[name]) for name in ("index_gb_s", "memory_gb_s")]
        table.add_row(f"{result['context']:,}", *cells, *speeds, f"{result['share']['lowest']:.0%}")
    Console(width=160).print(table)
    Console().print(machine())


if __name__ == "__main__":
    main()
