"""Prefill, decode and training steps of one `nano` checkpoint: ours against `transformers`, same threads, one run.

    python -m benchmarks.forward                 # 1k, 4k, 8k against transformers, 32k alone
    python -m benchmarks.forward --alone 32768 200000 --out docs/results/forward.md

Both sides hold the same fp32 weights, one row, random tokens. Decode steps are timed on a cache that a prefill filled.
The training step is forward, loss, backward and AdamW at T = 256 with 16 rows: sparse attention on both sides (that is
all transformers has), and ours with dense attention as well, which is what pre-training runs.
Beyond 8k ours runs alone: transformers' prefill needs T x T matrices.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, GlmMoeDsaForCausalLM
from transformers.utils import logging

import glm5
from benchmarks.measure import Spread, alternate, machine, peak_extra_bytes, ratios, timed
from glm5.model import LatentCache, initialize_

LONG = 65_536
"""Contexts beyond this are prefilled once."""
THEIR_CHUNK = 512
TARGETS = {"decode": 10.0, "prefill": 8.0, "train": 1.5}


@dataclass
class Options:
    """Options of the benchmark."""

    lengths: tuple[int, ...] = (1024, 4096, 8192)
    """Contexts measured on both sides."""
    alone: tuple[int, ...] = (32768,)
    """Contexts measured on our side only."""
    train: bool = True
    """Measure the training step."""
    prefill: bool = True
    """Measure the prefill."""
    repeats: int = 3
    decode_steps: int = 16
    threads: int = 1
    seed: int = 0
    out: Path | None = None
    """Write the table there as Markdown."""


@dataclass
class Result:
    """One row: a task at one length."""

    task: str
    tokens: int
    ours: Spread
    theirs: Spread | None
    amount: int
    """Tokens handled in one run."""
    ours_bytes: int = 0
    theirs_bytes: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def both_models(seed: int) -> tuple[glm5.GLM5, GlmMoeDsaForCausalLM]:
    """The same random weights on both sides, through a checkpoint directory."""
    model = glm5.GLM5(glm5.ModelConfig.from_preset("nano")).eval()
    initialize_(model, 0.05, seed)
    with tempfile.TemporaryDirectory() as directory:
        glm5.save_model(model, Path(directory) / "nano")
        theirs = GlmMoeDsaForCausalLM.from_pretrained(
            Path(directory) / "nano", dtype=torch.float32, attn_implementation="sdpa"
        )
    return model, theirs.eval()


def random_ids(config: glm5.ModelConfig, rows: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(10, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def prefill(ours: glm5.GLM5, theirs: GlmMoeDsaForCausalLM | None, tokens: int, options: Options) -> Result:
    ids = random_ids(ours.config, 1, tokens, options.seed)

    def our_call() -> object:
        cache = LatentCache(ours.config, batch=1, capacity=tokens)
        return ours(ids, cache=cache, logits_to_keep=1)

    calls: dict[str, Callable[[], object]] = {"ours": our_call}
    if theirs is not None:
        calls["theirs"] = lambda: theirs(ids, use_cache=True, logits_to_keep=1)
    if tokens > LONG:  # minutes a run: one run gives time and memory
        seconds: list[float] = []
        memory = {"ours": peak_extra_bytes(lambda: seconds.append(timed(our_call)))}
        times = {"ours": Spread(tuple(seconds))}
    else:
        times = alternate(calls, options.repeats)
        memory = {name: peak_extra_bytes(call) for name, call in calls.items()}
    return Result("prefill", tokens, times["ours"], times.get("theirs"), tokens,
                  memory["ours"], memory.get("theirs", 0))  # fmt: skip


@torch.inference_mode()
def decode(ours: glm5.GLM5, theirs: GlmMoeDsaForCausalLM | None, tokens: int, options: Options) -> Result:
    steps = options.decode_steps
    ids = random_ids(ours.config, 1, tokens, options.seed)
    room = (options.repeats + 2) * steps
    cache = LatentCache(ours.config, batch=1, capacity=tokens + room)
    if tokens <= LONG:
        ours(ids, cache=cache, logits_to_keep=1)
    else:  # the step's cost does not depend on what the rows hold
        for rows in [*cache.latents.values(), *cache.keys.values()]:
            rows.normal_(generator=torch.Generator().manual_seed(options.seed))
        cache.length = tokens
    token = ids[:, :1]

    def our_steps() -> None:
        cache.truncate(tokens)
        for _ in range(steps):
            ours(token, cache=cache, logits_to_keep=1)

    calls: dict[str, Callable[[], object]] = {"ours": our_steps}
    extra: dict[str, Any] = {"cache bytes per token, ours": cache.bytes_per_token}
    if theirs is not None:
        their_cache = DynamicCache(config=theirs.config)
        for part in ids.split(THEIR_CHUNK, dim=1):  # filled in parts: in one, 8k tokens take 8 GiB
            theirs(part, past_key_values=their_cache, use_cache=True, logits_to_keep=1)

        def their_steps() -> None:  # their cache of this model cannot be cut, so it grows by a few tokens a run
            for _ in range(steps):
                theirs(token, past_key_values=their_cache, use_cache=True, logits_to_keep=1)

        calls["theirs"] = their_steps
        extra["cache bytes per token, transformers"] = round(their_bytes_per_token(their_cache, tokens))
    times = alternate(calls, options.repeats)
    return Result("decode", tokens, times["ours"], times.get("theirs"), steps, extra=extra)


def their_bytes_per_token(cache: DynamicCache, tokens: int) -> float:
    """Bytes that transformers keeps per token of one row, all layers together (the MTP layer does not exist there)."""
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / tokens


def train(ours: glm5.GLM5, theirs: GlmMoeDsaForCausalLM, attention: str, options: Options) -> Result:
    rows, tokens = 16, 256
    ids = random_ids(ours.config, rows, tokens, options.seed)
    our_optimizer = torch.optim.AdamW([p for n, p in ours.named_parameters() if "mtp." not in n], lr=1e-5, fused=True)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5, fused=True)

    def step(logits: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: step(ours(ids, attention=attention).logits, our_optimizer),
        "theirs": lambda: step(theirs(ids, use_cache=False).logits, their_optimizer),
    }
    times = alternate(calls, options.repeats)
    memory = {name: peak_extra_bytes(call) for name, call in calls.items()}
    return Result(f"train step ({attention})", tokens, times["ours"], times["theirs"], rows * tokens,
                  memory["ours"], memory["theirs"])  # fmt: skip


def row(result: Result) -> list[str]:
    low, median, high = result.ours.rate(result.amount)
    cells = [result.task, f"{result.tokens:,}", f"{median:,.0f} ({low:,.0f} to {high:,.0f})"]
    if result.theirs is None:
        cells += ["", ""]
    else:
        t_low, t_median, t_high = result.theirs.rate(result.amount)
        r_low, r_median, r_high = ratios(result.ours, result.theirs)
        target = TARGETS[result.task.split()[0]]
        judged = result.tokens == 8192 or result.task.startswith("train")
        verdict = f", target {target:g}: {'met' if r_median >= target else 'MISSED'}" if judged else ""
        cells += [f"{t_median:,.0f} ({t_low:,.0f} to {t_high:,.0f})",
                  f"{r_median:.1f} ({r_low:.1f} to {r_high:.1f}){verdict}"]  # fmt: skip
    cells.append(f"{result.ours_bytes / 2**20:,.0f}" if result.ours_bytes else "")
    cells.append(f"{result.theirs_bytes / 2**20:,.0f}" if result.theirs_bytes else "")
    return cells


HEADER = ["task", "T", "ours, tokens/s", "transformers, tokens/s", "ratio", "ours, extra MiB", "theirs, extra MiB"]


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    ours, theirs = both_models(options.seed)
    results: list[Result] = []
    for attention in ("sparse", "dense") if options.train else ():
        results.append(train(ours, theirs, attention, options))
    ours.eval(), theirs.eval()
    measured = (prefill, decode) if options.prefill else (decode,)
    for tokens in options.lengths:
        results += [measure(ours, theirs, tokens, options) for measure in measured]
    for tokens in options.alone:
        results += [measure(ours, None, tokens, options) for measure in measured]
    cache = next(r.extra for r in results if r.task == "decode")
    facts = {**machine(), "seed": options.seed, "repeats": options.repeats, **cache}
    table = Table(*HEADER, title="nano, fp32: tokens per second, median (slowest to fastest)")
    for result in results:
        table.add_row(*row(result))
    Console(width=180).print(table, json.dumps(facts, indent=1))
    if options.out is not None:
        lines = ["| " + " | ".join(cells) + " |" for cells in [HEADER, ["---"] * len(HEADER), *map(row, results)]]
        command = f"python -m benchmarks.forward --threads {options.threads} --repeats {options.repeats}"
        listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        text = f"# Forward and training step of `nano` against transformers\n\n`{command}`\n\n{listed}\n\n"
        options.out.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
