"""The training step of `nano`: ours against `transformers` on the same weights, and against a plain dense model.

    python -m benchmarks.train --out docs/results/train.md
    python -m benchmarks.train --lengths 256 --repeats 3

A step is forward, cross-entropy, backward and fused AdamW, on the same batch, in the same dtype, with the same threads,
in one run, in turn (ours, theirs, dense, ours, ...). `transformers` has sparse attention only and its indexer has no
gradient, so ours runs sparse attention without the indexer's loss; rows that `transformers` cannot answer (our dense
attention, the step with the indexer's KL loss, with multi-token prediction) stand below for what they cost.
The dense model (`benchmarks/dense.py`) is nanoGPT-like with as many weights per token: no experts, no latents, fused
attention over all keys. It does less per token than GLM-5, so it is not a target but the line to be honest about.
At T = 4,096 `transformers` makes T x T matrices for 16 index heads and 4 attention heads: about 3 GiB for one row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.utils import logging

import glm5
from benchmarks.dense import like
from benchmarks.forward import both_models, random_ids
from benchmarks.measure import Spread, alternate, machine, peak_extra_bytes, ratios

TOKENS = 4096
"""Tokens of a batch: as many rows as fill it."""
TARGETS = {256: 1.5, 4096: 2.0}


@dataclass
class Options:
    """Options of the benchmark."""

    lengths: tuple[int, ...] = (256, 4096)
    """Tokens per row."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """fp32, or bf16: autocast over fp32 weights."""
    repeats: int = 5
    threads: int = 1
    seed: int = 0
    matmul: str = "highest"
    """`torch.set_float32_matmul_precision` for all sides."""
    clock: Literal["wall", "processor"] = "wall"
    """What a second is. With one thread on an idle machine both agree; beside other work the processor's compare."""
    extras: bool = True
    """Also time our dense attention, the indexer's loss and multi-token prediction."""
    out: Path | None = None
    """Write the table there as Markdown."""


@dataclass
class Result:
    """The steps of all models at one length in one dtype."""

    tokens: int
    rows: int
    dtype: str
    times: dict[str, Spread]
    extra_bytes: dict[str, int]


OURS, THEIRS, DENSE = "nano, sparse", "transformers", "dense model"


def steps(models: dict[str, nn.Module], ids_BT: Tensor, dtype: str, extras: bool) -> dict[str, Callable[[], object]]:
    """One training step of each kind, as calls without arguments."""
    ours, theirs, dense = models[OURS], models[THEIRS], models[DENSE]
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for name, m in models.items()}

    def cross_entropy(logits_BTV: Tensor) -> Tensor:
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())

    def step(loss: Callable[[], Tensor], owner: str) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                value = loss()
            value.backward()
            optimizers[owner].step()
            optimizers[owner].zero_grad()

        return run

    def with_indexer_loss() -> Tensor:
        out = ours(ids_BT, collect={"indexer_kl"})
        return cross_entropy(out.logits) + torch.stack(list(out.indexer_kl.values())).sum()

    def with_drafts() -> Tensor:
        out = ours(ids_BT, collect={"mtp"})
        return cross_entropy(out.logits) + 0.3 * cross_entropy(out.mtp_logits[0])

    calls: dict[str, Callable[[], object]] = {
        OURS: step(lambda: cross_entropy(ours(ids_BT).logits), OURS),
        THEIRS: step(lambda: cross_entropy(theirs(ids_BT, use_cache=False).logits), THEIRS),
        DENSE: step(lambda: cross_entropy(dense(ids_BT)), DENSE),
    }
    if extras:
        calls["nano, dense attention"] = step(lambda: cross_entropy(ours(ids_BT, attention="dense").logits), OURS)
        calls["nano, sparse, with the indexer's loss"] = step(with_indexer_loss, OURS)
        calls["nano, sparse, with one draft step"] = step(with_drafts, OURS)
    return calls


def measure(models: dict[str, nn.Module], tokens: int, dtype: str, options: Options) -> Result:
    config = glm5.ModelConfig.from_preset("nano")
    rows = max(1, TOKENS // tokens)
    calls = steps(models, random_ids(config, rows, tokens, options.seed), dtype, options.extras)
    memory = {name: peak_extra_bytes(call) for name, call in calls.items()}
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    return Result(tokens, rows, dtype, alternate(calls, options.repeats, warmup=0, clock=clock), memory)


HEADER = ["rows x T", "dtype", "step of", "tokens/s", "against transformers", "against the dense model", "extra MiB"]


def table_rows(result: Result) -> list[list[str]]:
    """The lines of one length and dtype; a ratio above 1 means that the line is faster."""
    lines = []
    for name, spread in result.times.items():
        low, median, high = spread.rate(result.tokens * result.rows)
        cells = [f"{result.rows} x {result.tokens:,}", result.dtype, name, f"{median:,.0f} ({low:,.0f} to {high:,.0f})"]
        for other in (THEIRS, DENSE):
            r_low, r_median, r_high = ratios(spread, result.times[other])
            text = "" if name == other else f"{r_median:.2f} ({r_low:.2f} to {r_high:.2f})"
            if name == OURS and other == THEIRS and result.tokens in TARGETS:
                target = TARGETS[result.tokens]
                text += f", target {target:g}: {'met' if r_median >= target else 'MISSED'}"
            cells.append(text)
        lines.append([*cells, f"{result.extra_bytes[name] / 2**20:,.0f}"])
    return lines


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul)
    logging.set_verbosity_error()
    ours, theirs = both_models(options.seed)
    dense = like(ours.config)
    models: dict[str, nn.Module] = {OURS: ours.train(), THEIRS: theirs.train(), DENSE: dense.train()}
    console = Console(width=180)
    lines: list[list[str]] = []
    for tokens in options.lengths:
        for dtype in options.dtypes:
            lines += table_rows(measure(models, tokens, dtype, options))
            console.print(*(" | ".join(line) for line in lines[-6:]), sep="\n", highlight=False)
    facts = {**machine(), "seed": options.seed, "repeats": options.repeats,
             "float32_matmul_precision": options.matmul, "clock": options.clock,
             "bf16 instructions": torch.cpu._is_avx512_bf16_supported(),
             "active weights, nano": ours.config.num_parameters(active=True),
             "active weights, dense model": dense.active_parameters()}  # fmt: skip
    table = Table(*HEADER, title="training step: tokens per second, median (slowest to fastest)")
    for line in lines:
        table.add_row(*line)
    console.print(table, json.dumps(facts, indent=1))
    if options.out is not None:
        command = f"python -m benchmarks.train --repeats {options.repeats} --clock {options.clock}"
        listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in [HEADER, ["---"] * len(HEADER), *lines])
        text = f"# The training step of `nano`\n\n`{command}`\n\n{NOTE}\n\n{listed}\n\n{body}\n"
        options.out.write_text(text, encoding="utf-8")


NOTE = (
    "Tokens per second: median (slowest to fastest). Ratios are taken pair by pair within one run; above 1 the line is "
    "faster than\nwhat it is held against. Extra memory: how far the resident memory rises during the first such step."
)


if __name__ == "__main__":
    main()
