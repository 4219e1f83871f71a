"""The lightning indexer's selection on a CPU: PyTorch's operators against the fused C pass, in one run.

    python -m benchmarks.indexer [--json]

Time per score (one query against one visible key: every head's product, ReLU, weighted head sum, top-k) for the last
`queries` of a context. The peer is the plain-operator path of `glm5.ops.selection`. `torch.mm` of the same products
alone, in cache-sized blocks, says what the multiply-adds must cost (the fused pass may beat it: it writes no products).
The three are timed in turn within every repeat, so that a busy machine disturbs them alike; ratios are medians over
the repeats, with their lowest and highest.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from glm5.ops import lightning, selection

CONTEXTS = (1024, 8192, 32768)
MM_ROWS = 256


@dataclass(frozen=True)
class Options:
    """Defaults: the indexer of `nano` on one thread."""

    queries: int = 512
    heads: int = 16
    width: int = 32
    k: int = 64
    repeats: int = 7
    threads: int = 1
    json: bool = False
    """Print JSON instead of a table."""


def products_alone(q_THI: Tensor, k_SI: Tensor) -> Callable[[], None]:
    """Every head product by `torch.mm` into one reused block of memory."""
    rows = q_THI.flatten(0, 1)
    key_blocks = k_SI.split(selection.KEY_BLOCK)
    out = torch.empty(MM_ROWS, len(key_blocks[0]))

    def run() -> None:
        for block in rows.split(MM_ROWS):
            for keys in key_blocks:
                torch.mm(block, keys.T, out=out[: len(block), : len(keys)])

    return run


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def measure(keys: int, options: Options) -> dict[str, object]:
    """Nanoseconds per score of each way, and the ratios between them, at one context length."""
    torch.manual_seed(0)
    queries = options.queries
    q_THI = torch.randn(queries, options.heads, options.width)
    k_SI = torch.randn(keys, options.width)
    w_TH = torch.randn(queries, options.heads)
    hi_T = torch.arange(keys - queries, keys) + 1
    row = q_THI, k_SI, w_TH, torch.zeros_like(hi_T), hi_T, options.k
    ways: dict[str, Callable[[], object]] = {
        "mm": products_alone(q_THI, k_SI),
        "torch": lambda: selection._select_row(*row),  # the public `select` would choose the fused pass
        "fused": lambda: lightning.select(*row),
    }
    scores = {"mm": queries * keys, "torch": int(hi_T.sum()), "fused": int(hi_T.sum())}
    ns: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        for name, work in ways.items():
            taken = seconds(work) / scores[name] * 1e9
            if repeat:  # the first round warms up
                ns[name].append(taken)
    return {
        "keys": keys,
        **{f"{name}_ns_per_score": spread(times) for name, times in ns.items()},
        "torch_over_fused": spread([a / b for a, b in zip(ns["torch"], ns["fused"], strict=True)]),
        "mm_over_fused": spread([a / b for a, b in zip(ns["mm"], ns["fused"], strict=True)]),
        "mm_over_torch": spread([a / b for a, b in zip(ns["mm"], ns["torch"], strict=True)]),
    }


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if not lightning.available():
        sys.exit("The C extension is not built: install a C compiler and run `pip install -e .` again.")
    torch.set_num_threads(options.threads)
    results = [measure(keys, options) for keys in CONTEXTS if keys >= options.queries]
    if options.json:
        print(json.dumps({"options": vars(options), "results": results}, indent=1))
        return
    columns = {
        "torch.mm alone, ns": ("mm_ns_per_score", "{:.2f}"),
        "PyTorch operators, ns": ("torch_ns_per_score", "{:.2f}"),
        "fused, ns": ("fused_ns_per_score", "{:.2f}"),
        "fused is faster by": ("torch_over_fused", "{:.2f}x"),
        "PyTorch, of mm's rate": ("mm_over_torch", "{:.0%}"),
        "fused, of mm's rate": ("mm_over_fused", "{:.0%}"),
    }
    table = Table("keys", *columns, title=f"{options.heads} heads x {options.width}, top {options.k}: per score")
    for result in results:
        cells = []
        for key, shape in columns.values():
            s = result[key]
            cells.append(f"{shape} ({shape} - {shape})".format(s["median"], s["lowest"], s["highest"]))  # type: ignore[index]
        table.add_row(str(result["keys"]), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
