"""The engine against `transformers` generate on one `nano` checkpoint, same threads, taking turns.

    python -m benchmarks.engine --out docs/results/engine.md             # everything but the long runs; an hour or more
    python -m benchmarks.engine --rows decode --batches 1 --contexts 8192 --alone    # one row
    python -m benchmarks.engine --rows long --threads 2                  # 200,000-token prompt, 131,072-token answer

Rows: `decode` (tokens per second of all rows together, from filled caches), `first` (seconds from a new prompt to its
first token, one row), `memory` (peak RSS of a process of its own), `flips`, `long`. Beyond `--contexts` ours runs alone
(`--alone`): transformers' prefill needs T x T matrices. Both sides hold the same fp32 weights; prompts are random.
A number is the median of the repeats with the slowest and the fastest; ratios are pair by pair.

`llama.cpp` was not tried: its `glm-dsa` is known to convert models with indexer heads of 32 values, as `nano` has, and
then to abort when a context is made; it may need 128.

`flips` compares fast mode with strict mode: the likeliest token and the log-probability of the given one at every
position of prompts (fast computes them in chunks), and whole greedy answers, 32 at once in fast mode.

`--rows long` asks a needle question of 200,000 tokens when `--model` and `--data` name a trained directory and its
held-out dataset, else random tokens, and then generates 131,072 tokens; it prints times and peak memory.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import glm5
from benchmarks.engine_sides import Ours, Theirs, checkpoint, greedy, own_peak, peak_rss, prompts
from benchmarks.measure import Spread, machine, ratios
from glm5.data import open_dataset
from glm5.data.long_context import LongContext
from glm5.text import Tokenizer

TARGETS = {("decode", 1, 8192): 15.0, ("decode", 32, 1024): 5.0}
LONG_PROMPT, LONG_ANSWER = 200_000, 131_072


@dataclass
class Options:
    """Options of the benchmark."""

    rows: tuple[Literal["decode", "first", "memory", "flips", "long"], ...] = ("decode", "first", "memory", "flips")
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (1024, 4096, 8192)
    """Contexts measured on both sides."""
    alone: tuple[int, ...] = (32768, 131_072, 200_000)
    """Contexts measured on our side only, one row."""
    steps: int = 32
    """Decode steps of a run."""
    repeats: int = 3
    threads: int = 2
    seed: int = 0
    strict: bool = False
    """Our side in strict mode."""
    theirs: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True
    """Measure the other side too."""
    model: Path | None = None
    data: Path | None = None
    prompt: int = LONG_PROMPT
    answer: int = LONG_ANSWER
    """Tokens of the long runs."""
    out: Path | None = None
    """Write the table there as Markdown."""


@dataclass
class Result:
    """One row of the table; times in seconds, amounts in tokens or (memory) bytes."""

    task: str
    batch: int
    context: int
    ours: str
    theirs: str = ""
    ratio: str = ""


def rate(spread: Spread, amount: int) -> str:
    low, median, high = spread.rate(amount)
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


def seconds(spread: Spread) -> str:
    return f"{spread.median:.2f} ({min(spread.runs):.2f} to {max(spread.runs):.2f})"


def ratio(ours: Spread, theirs: Spread, target: float | None) -> str:
    low, median, high = ratios(ours, theirs)
    verdict = "" if target is None else f", target {target:g}: {'met' if median >= target else 'MISSED'}"
    return f"{median:.1f} ({low:.1f} to {high:.1f}){verdict}"


def decode(directory: Path, batch: int, context: int, options: Options, *, both: bool) -> Result:
    ids = prompts(batch, context, options.seed)
    room = (options.repeats + 2) * options.steps
    ours = Ours(directory, batch * (context + room), strict=options.strict)
    ours.fill(ids)
    ours.decode(ids, options.steps)
    theirs = None
    if both:
        theirs = Theirs(directory)
        theirs.fill(ids)
        theirs.decode(options.steps)
    ours_runs, theirs_runs = [], []
    for _ in range(options.repeats):
        ours_runs.append(ours.decode(ids, options.steps))
        if theirs is not None:
            theirs_runs.append(theirs.decode(options.steps))
    ours.engine.close()
    amount, found = batch * options.steps, Spread(tuple(ours_runs))
    result = Result("decode, tokens/s", batch, context, rate(found, amount))
    if theirs is not None:
        other = Spread(tuple(theirs_runs))
        result.theirs = rate(other, amount)
        result.ratio = ratio(found, other, TARGETS.get(("decode", batch, context)))
    return result


def first_token(directory: Path, context: int, options: Options, *, both: bool) -> Result:
    repeats = options.repeats if both else 1
    ours = Ours(directory, (repeats + 2) * context, strict=options.strict)
    theirs = Theirs(directory) if both else None
    ours.fill(prompts(1, 512, options.seed))
    ours_runs, theirs_runs = [], []
    for i in range(repeats):
        ids = prompts(1, context, options.seed + 1 + i)  # new each time: nothing of it is cached
        ours_runs.append(ours.fill(ids))
        if theirs is not None:
            theirs_runs.append(theirs.first_token(ids))
    ours.engine.close()
    found = Spread(tuple(ours_runs))
    result = Result("first token, s", 1, context, seconds(found))
    if theirs is not None:
        other = Spread(tuple(theirs_runs))
        result.theirs = seconds(other)
        result.ratio = ratio(found, other, None)
    return result


def memory(directory: Path, context: int, options: Options, *, both: bool) -> Result:
    mib = lambda side: f"{peak_rss(side, directory, context, options.threads) / 2**20:,.0f}"
    return Result("peak RSS, MiB", 1, context, mib("ours"), mib("theirs") if both else "")


def cache_bytes(directory: Path) -> list[Result]:
    theirs = Theirs(directory)
    theirs.fill(prompts(1, 256, 0))
    theirs.decode(1)
    kept = {name: Ours(directory, 64, storage=name).bytes_per_token for name in ("fp32", "bf16", "fp8")}
    other = theirs.bytes_per_token
    results = []
    for name, size in kept.items():
        result = Result(f"cache, bytes per token ({name})", 1, 0, f"{size:,.0f}")
        if name == "fp32":
            result.theirs, result.ratio = f"{other:,.0f} (fp32)", f"{other / size:.2f}"
        else:
            result.ratio = f"{kept['fp32'] / size:.2f} of ours in fp32"
        results.append(result)
    return results


def flips(directory: Path, options: Options) -> list[Result]:
    """How far fast mode is from strict mode on the same requests."""
    context, answers = 1024, 32
    ids, starts = prompts(4, context, options.seed), prompts(answers, 64, options.seed + 1)
    seen = {}
    for strict in (True, False):
        ours = Ours(directory, 4 * context + answers * 128, strict=strict)
        prompt_only = replace(greedy(1), prompt_logprobs=1)
        rows = [output.prompt_logprobs or () for output in ours.engine.generate(ids, prompt_only)]
        said = [output.token_ids for output in ours.engine.generate(starts, greedy(64))]
        seen[strict] = [entry for row in rows for entry in row if entry is not None], said
        ours.engine.close()
    pairs = list(zip(seen[True][0], seen[False][0], strict=True))
    flipped = sum(a[2][0][0] != b[2][0][0] for a, b in pairs)
    apart = [abs(a[1] - b[1]) for a, b in pairs]
    same = sum(a == b for a, b in zip(seen[True][1], seen[False][1], strict=True))
    text = f"{flipped} of {len(pairs):,} likeliest tokens differ; log-probabilities by {statistics.mean(apart):.1e} "
    return [
        Result("fast against strict, prompts", 4, context, text + f"in the mean, {max(apart):.1e} at most"),
        Result(
            "fast against strict, answers", answers, 128, f"{same} of {answers} greedy answers of 64 tokens are equal"
        ),
    ]


def long_runs(directory: Path, options: Options, console: Console) -> list[Result]:
    """The two long runs, each through the public API; peak memory is this process's own."""
    needle, prompt = None, prompts(1, options.prompt, options.seed)[0]
    if options.model is not None and options.data is not None:
        directory = options.model
        filler = open_dataset(options.data)
        source = LongContext(Tokenizer.from_pretrained(directory), filler, split="heldout", seed=options.seed)
        needle = source.needles(options.prompt, 0, depth=0.5)
        prompt = needle.ids[: needle.answers[0][0]]
    room = max(len(prompt) + 16, options.answer + 64)
    engine = glm5.Engine(directory, num_blocks=room // 64 + 2, strict=options.strict)
    results = []
    for name, ids, new in (("prompt", prompt, 16), ("answer", prompt[:64], options.answer)):
        start, first, tokens = time.perf_counter(), 0.0, []
        for seen, delta in enumerate(engine.stream(ids, greedy(new)), 1):
            tokens.append(delta.token_id)
            if seen == 1:
                first = time.perf_counter() - start
            if seen % 8192 == 0:
                console.print(f"{seen:,} tokens after {time.perf_counter() - start:,.0f} s")
        took = time.perf_counter() - start
        text = f"{took:,.0f} s, first token after {first:,.1f} s, {own_peak() / 2**30:.2f} GiB peak"
        if name == "prompt" and needle is not None:
            begin, end = needle.answers[0]
            text += f", needle {'found' if tokens[: end - begin] == needle.ids[begin:end] else 'NOT found'}"
        results.append(Result(f"long {name}", 1, len(ids) + new, text))
        console.print(results[-1].task, results[-1].ours)
    engine.close()
    return results


HEADER = ["task", "rows", "context", "ours", "transformers", "ratio"]


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    console, results = Console(width=160), []
    with tempfile.TemporaryDirectory() as temporary:
        directory = checkpoint(Path(temporary) / "nano", options.seed)
        for context, both in [(c, options.theirs) for c in options.contexts] + [(c, False) for c in options.alone]:
            for batch in options.batches if context not in options.alone else (1,):
                if "decode" in options.rows:
                    results.append(decode(directory, batch, context, options, both=both))
            if "first" in options.rows:
                results.append(first_token(directory, context, options, both=both))
            if "memory" in options.rows:
                results.append(memory(directory, context, options, both=both))
            console.print(*(f"{r.task} {r.batch} x {r.context:,}: {r.ours} {r.theirs} {r.ratio}" for r in results[-3:]),
                          sep="\n")  # fmt: skip
        if "memory" in options.rows:
            results += cache_bytes(directory)
        if "flips" in options.rows:
            results += flips(directory, options)
        if "long" in options.rows:
            results += long_runs(directory, options, console)
    cells = [[r.task, str(r.batch), f"{r.context:,}" if r.context else "", r.ours, r.theirs, r.ratio] for r in results]
    facts = {**machine(), "seed": options.seed, "repeats": options.repeats, "strict": options.strict}
    table = Table(*HEADER, title="nano, fp32, greedy: median (slowest to fastest)")
    for row in cells:
        table.add_row(*row)
    console.print(table, json.dumps(facts, indent=1))
    if options.out is not None:
        lines = ["| " + " | ".join(row) + " |" for row in [HEADER, ["---"] * len(HEADER), *cells]]
        listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        title = "# The engine against transformers' generate, `nano`"
        named = f"python -m benchmarks.engine --rows {' '.join(options.rows)} --threads {options.threads}"
        llama = "llama.cpp: not tried; it is known to abort on indexer heads of 32 values."
        options.out.write_text(f"{title}\n\n`{named}`\n\n{listed}\n\n" + "\n".join(lines) + f"\n\n{llama}\n", "utf-8")


if __name__ == "__main__":
    main()
