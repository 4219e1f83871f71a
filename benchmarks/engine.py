"""The engine against `transformers` generate and llama.cpp on one checkpoint, same threads, taking turns.

    python -m benchmarks.engine --out table.md                           # against transformers; an hour or more
    python -m benchmarks.engine --rows decode --batches 1 --contexts 8192 --alone    # one row
    python -m benchmarks.engine --peers llama-f32 llama-bf16 --llama-cpp DIR --contexts 1024 16384 --alone
    python -m benchmarks.engine --rows long --threads 2                  # 200,000-token prompt, 131,072-token answer

Rows: `decode` (tokens per second of all rows together, from filled caches), `first` (seconds from a new prompt to its
first token, one row), `memory` (peak RSS of a process of its own, and bytes of the cache), and those of
`benchmarks.engine_checks`. Beyond `--contexts` ours runs alone (`--alone`). Prompts are random. A number is the median
of the repeats with the slowest and the fastest; ratios are pair by pair.

transformers holds the same fp32 weights of `nano`. llama.cpp does not run heads of 32 values in its indexer, so with
it all sides hold `nano` with heads of 64 (`engine_sides.checkpoint`). `llama-f32` has fp32 weights as ours,
`llama-bf16` and `llama-q8_0` rounded ones; its cache is in fp16, its default and fastest (`--storage bf16`: two bytes
in ours).

`--rows long` asks a needle question of 200,000 tokens when `--model` and `--data` name a trained directory and its
held-out dataset, else random tokens, and then generates 131,072 tokens; it prints times and peak memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
import tyro
from rich.console import Console
from rich.table import Table

import glm5
from benchmarks.engine_checks import Result, agree, conversation, flips
from benchmarks.engine_sides import (
    LlamaCpp,
    Ours,
    Peer,
    Transformers,
    as_gguf,
    checkpoint,
    greedy,
    peak_alone,
    peak_of,
    prompts,
)
from benchmarks.llama_cpp import Clock, Kind
from benchmarks.measure import Spread, machine, ratios
from glm5.data import open_dataset
from glm5.data.long_context import LongContext
from glm5.text import Tokenizer

TARGETS = {("decode", 1, 8192): 15.0, ("decode", 32, 1024): 5.0}
"""Against transformers."""
LONG_PROMPT, LONG_ANSWER = 200_000, 131_072

Row = Literal["decode", "first", "memory", "flips", "agree", "conversation", "long"]
PeerName = Literal["transformers", "llama-f32", "llama-bf16", "llama-q8_0"]


@dataclass
class Options:
    """Options of the benchmark."""

    rows: tuple[Row, ...] = ("decode", "first", "memory", "flips")
    peers: tuple[PeerName, ...] = ("transformers",)
    llama_cpp: Path | None = None
    """The unpacked and built source distribution of llama-cpp-python."""
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (1024, 4096, 8192)
    """Contexts measured on all sides."""
    alone: tuple[int, ...] = (32768, 131_072, 200_000)
    """Contexts measured on our side only, one row."""
    steps: int = 32
    """Decode steps of a run."""
    repeats: int = 3
    threads: int = 2
    clock: Clock = "wall"
    """"cpu" counts the processor's seconds of all threads: on a busy machine the more telling clock."""
    seed: int = 0
    strict: bool = False
    """Our side in strict mode."""
    storage: Literal["fp32", "bf16", "fp8"] | None = None
    """Our side's cache; None is fp32 as the weights. llama.cpp's is fp16."""
    model: Path | None = None
    data: Path | None = None
    prompt: int = LONG_PROMPT
    answer: int = LONG_ANSWER
    """Tokens of the long runs."""
    out: Path | None = None
    """Write the table there as Markdown."""

    @property
    def kinds(self) -> list[Kind]:
        """The formats in which llama.cpp takes part."""
        return [cast(Kind, name.removeprefix("llama-")) for name in self.peers if name.startswith("llama-")]


def our_side(directory: Path, tokens: int, options: Options) -> Ours:
    return Ours(directory, tokens, strict=options.strict, storage=options.storage, clock=options.clock)


def peer(name: PeerName, directory: Path, rows: int, tokens: int, options: Options) -> Peer:
    """Another side with room for `rows` sequences of `tokens` tokens."""
    if name == "transformers":
        return Transformers(directory, options.clock)
    assert options.llama_cpp is not None
    kind = cast(Kind, name.removeprefix("llama-"))
    file = as_gguf(options.llama_cpp, directory, kind)
    return LlamaCpp(options.llama_cpp, file, rows=rows, tokens=tokens, threads=options.threads, clock=options.clock)


def rate(spread: Spread, amount: int) -> str:
    low, median, high = spread.rate(amount)
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


def seconds(spread: Spread) -> str:
    return f"{spread.median:.2f} ({min(spread.runs):.2f} to {max(spread.runs):.2f})"


def ratio(ours: Spread, theirs: Spread, target: float | None = None) -> str:
    low, median, high = ratios(ours, theirs)
    verdict = "" if target is None else f", target {target:g}: {'met' if median >= target else 'MISSED'}"
    return f"{median:.2g} ({low:.2g} to {high:.2g}){verdict}"


def decode(directory: Path, batch: int, context: int, names: tuple[PeerName, ...], options: Options) -> list[Result]:
    ids = prompts(batch, context + 1, options.seed)  # full blocks and a token: of ours only that is computed again
    room = (options.repeats + 2) * options.steps
    with ExitStack() as stack:
        ours = our_side(directory, batch * (context + 64 + room), options)
        stack.enter_context(closing(ours.engine))
        ours.fill(ids)
        ours.decode(ids, options.steps)
        peers: dict[str, Peer] = {}
        for name in names:
            peers[name] = stack.enter_context(closing(peer(name, directory, batch, context + room, options)))
            peers[name].fill(ids)
            peers[name].decode(options.steps)
        runs: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        for _ in range(options.repeats):
            runs["ours"].append(ours.decode(ids, options.steps))
            for other, side in peers.items():
                runs[other].append(side.decode(options.steps))
    amount, found = batch * options.steps, {name: Spread(tuple(times)) for name, times in runs.items()}
    mine = rate(found["ours"], amount)
    target = lambda name: TARGETS.get(("decode", batch, context)) if name == "transformers" else None
    return [
        Result("decode, tokens/s", batch, context, mine, name, rate(found[name], amount),
               ratio(found["ours"], found[name], target(name)))
        for name in names
    ] or [Result("decode, tokens/s", batch, context, mine)]  # fmt: skip


def first_token(directory: Path, context: int, names: tuple[PeerName, ...], options: Options) -> list[Result]:
    repeats = options.repeats if names else 1
    with ExitStack() as stack:
        ours = our_side(directory, (repeats + 2) * context, options)
        stack.enter_context(closing(ours.engine))
        ours.fill(prompts(1, 512, options.seed))
        peers = {n: stack.enter_context(closing(peer(n, directory, 1, context, options))) for n in names}
        for side in peers.values():
            side.first_token(prompts(1, 512, options.seed))
        runs: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        for i in range(repeats):
            ids = prompts(1, context, options.seed + 1 + i)  # new each time: nothing of it is cached
            runs["ours"].append(ours.fill(ids))
            for name, side in peers.items():
                runs[name].append(side.first_token(ids))
    found = {name: Spread(tuple(times)) for name, times in runs.items()}
    mine = seconds(found["ours"])
    return [
        Result("first token, s", 1, context, mine, name, seconds(found[name]), ratio(found["ours"], found[name]))
        for name in names
    ] or [Result("first token, s", 1, context, mine)]


def memory(directory: Path, context: int, names: tuple[PeerName, ...], options: Options) -> list[Result]:
    """Peak resident memory of processes that answer a prompt with 16 tokens."""
    task, found = "peak RSS, MiB", {"ours": peak_alone("ours", directory, context, options.threads)}
    for name in names:
        if name == "transformers":
            found[name] = peak_alone(name, directory, context, options.threads)
            continue
        with closing(peer(name, directory, 1, context + 16, options)) as side:
            side.fill(prompts(1, context, 1))
            side.decode(16)
            found[name] = side.peak
    mib = {name: f"{size / 2**20:,.0f}" for name, size in found.items()}
    return [
        Result(task, 1, context, mib["ours"], name, mib[name], f"{found[name] / found['ours']:.2g}") for name in names
    ] or [Result(task, 1, context, mib["ours"])]


def cache_bytes(directory: Path, options: Options) -> list[Result]:
    results, kept = [], {s: Ours(directory, 64, storage=s).bytes_per_token for s in ("fp32", "bf16", "fp8")}
    for name, size in kept.items():
        results.append(Result(f"cache, bytes per token ({name})", 1, 0, f"{size:,.0f}"))
    for name in options.peers:
        with closing(peer(name, directory, 1, 16_384, options)) as side:  # llama.cpp reports 0.01 MiB
            side.fill(prompts(1, 256, 0))
            side.decode(1)
            size, alike = side.bytes_per_token, "fp32" if name == "transformers" else "bf16"
        ours = f"{kept[alike]:,.0f}"
        results.append(
            Result(f"cache, bytes per token ({alike})", 1, 0, ours, name, f"{size:,.0f}", f"{size / kept[alike]:.2f}")
        )
    return results


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
    engine = glm5.Engine(directory, num_blocks=room // 64 + 2, strict=options.strict, storage=options.storage)
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
        text = f"{took:,.0f} s, first token after {first:,.1f} s, {peak_of('self') / 2**30:.2f} GiB peak"
        if name == "prompt" and needle is not None:
            begin, end = needle.answers[0]
            text += f", needle {'found' if tokens[: end - begin] == needle.ids[begin:end] else 'NOT found'}"
        results.append(Result(f"long {name}", 1, len(ids) + new, text))
        console.print(results[-1].task, results[-1].ours)
    engine.close()
    return results


HEADER = ["task", "rows", "context", "ours", "peer", "theirs", "ratio"]


def measured(options: Options, console: Console) -> list[Result]:
    """All rows; each is shown as soon as it is there."""
    results: list[Result] = []

    def add(rows: list[Result]) -> None:
        results.extend(rows)
        for r in rows:
            console.print(f"{r.task} {r.batch} x {r.context:,}: {r.ours} | {r.peer} {r.theirs} {r.ratio}")

    with tempfile.TemporaryDirectory() as temporary:
        directory = checkpoint(Path(temporary) / "nano", options.seed, llama=bool(options.kinds))
        for context, names in [(c, options.peers) for c in options.contexts] + [(c, ()) for c in options.alone]:
            if "first" in options.rows:
                add(first_token(directory, context, names, options))
            if "memory" in options.rows:
                add(memory(directory, context, names, options))
            for batch in options.batches if context not in options.alone else (1,):
                if "decode" in options.rows:
                    add(decode(directory, batch, context, names, options))
        if "memory" in options.rows:
            add(cache_bytes(directory, options))
        if "flips" in options.rows:
            add(flips(directory, options.seed))
        if "agree" in options.rows and options.llama_cpp is not None:
            add(agree(directory, options.llama_cpp, options.kinds, options.seed, options.threads))
        if "conversation" in options.rows:
            add(conversation())
        if "long" in options.rows:
            add(long_runs(directory, options, console))
    return results


def main() -> None:
    options = tyro.cli(Options)
    if options.kinds and options.llama_cpp is None:
        raise SystemExit("--peers llama-... need --llama-cpp DIR: how to build it stands in docs/results/engine.md")
    torch.set_num_threads(options.threads)
    console = Console(width=180)
    results = measured(options, console)
    cells = [
        [r.task, str(r.batch), f"{r.context:,}" if r.context else "", r.ours, r.peer, r.theirs, r.ratio]
        for r in results
    ]
    facts = {
        **machine(),
        "seed": options.seed,
        "repeats": options.repeats,
        "strict": options.strict,
        "clock": options.clock,
    }
    table = Table(*HEADER, title="fp32, greedy: median (slowest to fastest); a ratio above 1: ours is ahead")
    for row in cells:
        table.add_row(*row)
    console.print(table, json.dumps(facts, indent=1))
    if options.out is not None:
        lines = ["| " + " | ".join(row) + " |" for row in [HEADER, ["---"] * len(HEADER), *cells]]
        listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        text = "\n".join(lines)
        options.out.write_text(
            f"`python -m benchmarks.engine {' '.join(sys.argv[1:])}`\n\n{listed}\n\n{text}\n", "utf-8"
        )


if __name__ == "__main__":
    main()
