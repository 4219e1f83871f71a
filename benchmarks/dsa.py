"""The bars of sparse attention at `nano` size: recall of the indexer, bits per byte and needles against dense.

    glm5 quickstart --out runs/quickstart           # or any recipe: its tokenizer, data and pretrain run are used
    python -m benchmarks.dsa --recipe runs/quickstart --out docs/results/dsa.md
    python -m benchmarks.dsa --recipe runs/quickstart --quick       # the whole path in a minute or two, no result

Per seed: midtrain (long-context rows, 64 to 2,048 tokens) -> dsa1 (the indexer alone) -> dsa2 (sparse), and beside dsa2
a dense continuation of midtrain on the same batches, for as many steps, at the same rate. A run that is whole below
`--work` is measured, not run again. Printed, for every seed:

- recall after dsa1: attention mass of the indexer's top-k over that of the true top-k, held-out rows of 8 x index_topk
  (bar: 90% in the mean over layers) and of 32 x index_topk;
- bits per byte of held-out text, dsa2 with sparse attention against the dense continuation (bar: within 1%);
- needles at 32 x index_topk, the same two models, the same questions (bar: the 95% interval of the paired difference
  above -3 points; it counts where the dense model finds 90%).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

import glm5
from benchmarks.measure import machine
from glm5.data import Share, open_dataset, write_dataset
from glm5.data.long_context import DEFAULT_WORDS, LongContext
from glm5.evals.needles import NeedleConfig, NeedleResult, compare_needles, find_needles
from glm5.optim import OptimizerConfig, Schedule
from glm5.text import Tokenizer
from glm5.train import LoopConfig, MidtrainConfig, Phase, SparseConfig, evaluate_bits_per_byte, midtrain, train_sparse
from glm5.train.dsa import DSAConfig, warm_up_indexer
from glm5.train.indexer_recall import measure_indexer_recall

TEXT = 0.25
"""Share of plain text in the rows of mid-training."""


@dataclass(frozen=True)
class LongPhase:
    """One phase of the curriculum: rows of `length` tokens over the first `words` words."""

    length: int
    rows: int
    steps: int
    words: int
    kinds: dict[str, float]
    zipf: float | None = None
    text: float = TEXT


LISTS = {"repeat": 1.0, "key_value": 1.0}
NEEDLES = {"repeat": 0.5, "key_value": 1.0, "multi_needle": 2.0, "needle": 1.0}
CURRICULUM = (
    LongPhase(64, 16, 300, 32, LISTS, text=0.125),
    LongPhase(64, 16, 300, DEFAULT_WORDS, LISTS, zipf=8.0, text=0.125),
    LongPhase(64, 16, 60, DEFAULT_WORDS, NEEDLES, text=0.125),
    LongPhase(128, 9, 100, DEFAULT_WORDS, NEEDLES, text=0.125),
    LongPhase(256, 5, 80, DEFAULT_WORDS, NEEDLES),
    LongPhase(512, 4, 60, DEFAULT_WORDS, NEEDLES, text=0.5),
    LongPhase(1024, 2, 40, DEFAULT_WORDS, NEEDLES, text=0.5),
    LongPhase(2048, 2, 40, DEFAULT_WORDS, NEEDLES, text=0.5),
)
"""Short rows over few words until the circuit that looks up has formed, then more words, then longer rows."""
MIDTRAIN_LOOP = LoopConfig(
    steps=sum(phase.steps for phase in CURRICULUM),
    optimizer=OptimizerConfig(lr=8e-3, embedding_lr_scale=3.0),
    schedule=Schedule(shape="linear", warmup_steps=10, final_fraction=0.1),
    spike_factor=None,
    checkpoint_every=50,
)
INDEXER_LOOP = LoopConfig(
    steps=100,
    optimizer=OptimizerConfig(name="adamw", lr=5e-3, weight_decay=0.0),
    schedule=Schedule(shape="cosine", warmup_steps=5, final_fraction=0.04),
    router_bias_rate=0.0,
    checkpoint_every=50,
)
SPARSE_LOOP = LoopConfig(
    steps=60,
    optimizer=OptimizerConfig(lr=5e-4, embedding_lr_scale=3.0),
    indexer_optimizer=OptimizerConfig(name="adamw", lr=2e-4, weight_decay=0.0),
    schedule=Schedule(shape="constant", warmup_steps=5),
    spike_factor=None,
    checkpoint_every=50,
)


@dataclass
class Options:
    """Options of the benchmark."""

    recipe: Path
    """Directory of a quickstart or recipe: tokenizer, data/train, data/heldout, pretrain."""
    parents: tuple[Path, ...] = ()
    """A pre-trained run for each seed; default: the recipe's own for all of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    work: Path = Path("runs/dsa")
    """Where the runs lie: one directory per seed."""
    questions: int = 40
    """Needles for each of five depths."""
    heldout_documents: int | None = None
    """Documents for the bits per byte; default all."""
    threads: int = 1
    quick: bool = False
    """A few steps of everything, to see that it runs."""
    out: Path | None = None
    """Write the table there as Markdown."""


@dataclass
class Measured:
    """All numbers of one seed."""

    seed: int
    recall: dict[str, dict[str, float]] = field(default_factory=dict)
    """`dsa1 512` and the like -> mass, worst layer's mass, positions."""
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    needles: dict[str, str] = field(default_factory=dict)
    dense_found: float = 0.0
    difference: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)


class Chain:
    """The runs of one seed."""

    def __init__(self, options: Options, seed: int, parent: Path, console: Console) -> None:
        self.options, self.seed, self.parent, self.console = options, seed, parent, console
        self.root = options.work / f"seed-{seed}"
        self.text, self.heldout = (options.recipe / "data" / split for split in ("train", "heldout"))
        self.tokenizer = Tokenizer.from_pretrained(options.recipe / "tokenizer")
        self.curriculum = CURRICULUM
        if options.quick:
            self.curriculum = tuple(dataclasses.replace(p, rows=1, steps=2) for p in CURRICULUM if p.length <= 256)
        self.length = self.curriculum[-1].length

    def loop(self, loop: LoopConfig, steps: int | None = None) -> LoopConfig:
        """The same with this seed, and few steps when it is quick."""
        steps = steps or (3 if self.options.quick else loop.steps)
        return dataclasses.replace(loop, steps=steps, seed=self.seed)

    def shares(self, phase: LongPhase) -> tuple[Share, ...]:
        """Generated rows of a phase, and text."""
        kind = "lists" if phase.kinds == LISTS else "needles"
        name = f"seed-{self.seed}-{phase.length}-{phase.words}-{phase.zipf or 'even'}-{kind}"
        path = self.options.work / "data" / name
        if not path.exists():
            text = open_dataset(self.text, self.tokenizer)
            maker = LongContext(self.tokenizer, text, split="train", seed=self.seed, words=phase.words, zipf=phase.zipf)
            count = phase.rows * phase.steps + 1  # none is seen twice
            write_dataset(path, maker.documents(count, phase.length, phase.kinds), self.tokenizer)
        return (Share(path=path, weight=1 - phase.text), Share(path=self.text, weight=phase.text))

    def run(self) -> dict[str, Path]:
        """All runs of this seed, done or found; name -> model directory."""
        phases = tuple(
            Phase(length=p.length, rows=p.rows, steps=p.steps, train_data=self.shares(p)) for p in self.curriculum
        )
        documents = 1 if self.options.quick else 12
        common: dict[str, Any] = {"heldout_data": self.heldout, "heldout_documents": documents, "mtp_weight": 0.0}
        longest = phases[-1].train_data
        assert isinstance(longest, tuple)
        midtrained = self.do(
            "midtrain", midtrain, MidtrainConfig,
            parent=self.parent, train_data=self.text, phases=phases, rope_theta=None,
            loop=self.loop(MIDTRAIN_LOOP, sum(phase.steps for phase in phases)), **common,
        )  # fmt: skip
        rows: dict[str, Any] = {"train_data": longest, "rows": 1, "length": self.length, **common}
        warm = self.do("dsa1", warm_up_indexer, DSAConfig, parent=midtrained, loop=self.loop(INDEXER_LOOP), **rows)
        sparse = self.do("dsa2", train_sparse, SparseConfig, parent=warm, loop=self.loop(SPARSE_LOOP), **rows)
        loop = dataclasses.replace(self.loop(SPARSE_LOOP), indexer_optimizer=None)
        phase = Phase(length=self.length, rows=1, steps=loop.steps)
        dense = self.do(
            "dense", midtrain, MidtrainConfig, parent=midtrained, train_data=longest, phases=(phase,), rope_theta=None,
            loop=loop, **common,
        )  # fmt: skip
        return {"midtrain": midtrained, "dsa1": warm, "dsa2": sparse, "dense": dense}

    def do(self, name: str, stage: Any, config: Any, **values: Any) -> Path:
        path = self.root / name
        resume = (path / "run.json").exists()
        return Path(stage(config(**values), path, resume=resume, console=self.console).model_directory)

    def measure(self, models: dict[str, Path]) -> Measured:
        """Every number of the bars."""
        found = Measured(self.seed)
        heldout = open_dataset(self.heldout, self.tokenizer)
        loaded = {name: glm5.load_model(path, dtype=torch.float32) for name, path in models.items()}
        short, long = lengths(loaded["dsa1"].config.index_topk, self.options.quick)
        for name in ("midtrain", "dsa1", "dsa2"):
            for length in (short, long):
                recall = measure_indexer_recall(loaded[name], heldout, length=length, rows=max(1, 4096 // length))
                found.recall[f"{name} {length}"] = {
                    "mass": recall.mass, "worst layer": recall.worst_mass, "positions": recall.positions,
                    "joined": recall.joined,
                }  # fmt: skip
        documents = 2 if self.options.quick else self.options.heldout_documents
        answers: dict[str, NeedleResult] = {}
        for name, attention in (("dense", "dense"), ("dsa1", "sparse"), ("dsa2", "sparse"), ("dsa2", "dense")):
            label = f"{name}, {attention} attention"
            found.bits_per_byte[label] = evaluate_bits_per_byte(
                loaded[name].eval(), heldout, length=self.length, rows=2, documents=documents, attention=attention
            ).bits_per_byte  # type: ignore[arg-type]
            config = NeedleConfig(
                lengths=(long,), per_cell=1 if self.options.quick else self.options.questions,
                attention=attention, rows=2,
            )  # type: ignore[arg-type]  # fmt: skip
            answers[label] = find_needles(loaded[name], self.tokenizer, heldout, config)
            found.needles[label] = str(answers[label].accuracy())
        dense, sparse = answers["dense, dense attention"], answers["dsa2, sparse attention"]
        found.dense_found = dense.accuracy().value
        found.difference = compare_needles(dense, sparse)
        for name in models:
            speed = [json.loads(line) for line in (self.root / name / "speed.jsonl").read_text().splitlines()]
            found.seconds[name] = round(sum(line["seconds"] for line in speed), 1)
            last = sorted(line["tokens_per_second"] for line in speed[-20:])
            found.tokens_per_second[name] = last[len(last) // 2]
        return found


def lengths(topk: int, quick: bool) -> tuple[int, int]:
    """The two contexts that are measured: 8 and 32 times what sparse attention reads."""
    return (2 * topk, 4 * topk) if quick else (8 * topk, 32 * topk)


def lines(found: Measured, at: tuple[int, int]) -> list[tuple[str, str, str]]:
    """(what, number, against its bar) of one seed, measured at the two contexts `at`."""
    short, long = (found.recall[f"dsa1 {length}"] for length in at)
    dense, sparse = (found.bits_per_byte[f"{name} attention"] for name in ("dense, dense", "dsa2, sparse"))
    excess = sparse / dense - 1
    counts = found.dense_found >= 0.9
    needles = "not counted: the dense model finds fewer than 90%"
    if counts:
        needles = "met" if found.difference.low >= -0.03 else "MISSED"
    rows = [
        (f"recall after dsa1, {at[0]} tokens", shown(short), "met" if short["mass"] >= 0.9 else "MISSED"),
        (f"recall after dsa1, {at[1]} tokens", shown(long), ""),
        ("bits per byte, sparse against dense", f"{sparse:.4f} / {dense:.4f} ({excess:+.2%})",
         "met" if excess <= 0.01 else "MISSED"),
        (f"needles at {at[1]}, sparse less dense", str(found.difference), needles),
    ]  # fmt: skip
    rows += [(f"recall of {name}", shown(value), "") for name, value in found.recall.items() if "dsa1" not in name]
    rows += [(f"bits per byte, {name}", f"{value:.4f}", "") for name, value in found.bits_per_byte.items()]
    rows += [(f"needles, {name}", value, "") for name, value in found.needles.items()]
    rows += [(f"{name}: seconds, tokens/s of the last 20 steps", f"{found.seconds[name]:,}, {speed:,}", "")
             for name, speed in found.tokens_per_second.items()]  # fmt: skip
    return rows


def shown(recall: dict[str, float]) -> str:
    """Shares of one model at one length."""
    joined = "rows joined over documents" if recall["joined"] else "whole documents"
    return (f"mass {recall['mass']:.1%} (worst layer {recall['worst layer']:.1%}), "
            f"positions {recall['positions']:.1%}; {joined}")  # fmt: skip


def markdown(found: list[Measured], options: Options, at: tuple[int, int]) -> str:
    """The page of results."""
    seeds = " ".join(str(one.seed) for one in found)
    command = f"python -m benchmarks.dsa --recipe {options.recipe.name} --seeds {seeds} --questions {options.questions}"
    parts = ["# Sparse attention of `nano`: recall, bits per byte, needles", "", f"`{command}`", "",
             *(f"- {name}: {value}" for name, value in machine().items()), ""]  # fmt: skip
    if options.quick:
        parts += ["A quick run: a few steps of each stage. These numbers say nothing.", ""]
    for one in found:
        parts += [f"## Seed {one.seed}", "", "| what | found | bar |", "| --- | --- | --- |"]
        parts += [f"| {what} | {number} | {bar} |" for what, number, bar in lines(one, at)] + [""]
    return "\n".join(parts)


def main(options: Options) -> None:
    """Runs what is missing, measures, prints and writes."""
    torch.set_num_threads(options.threads)
    console = Console()
    parents = options.parents or (options.recipe / "pretrain",) * len(options.seeds)
    found, at = [], (0, 0)
    for seed, parent in zip(options.seeds, parents, strict=True):
        chain = Chain(options, seed, parent, console)
        models = chain.run()
        at = lengths(glm5.ModelConfig.from_pretrained(models["dsa1"]).index_topk, options.quick)
        found.append(chain.measure(models))
        for what, number, bar in lines(found[-1], at):
            console.print(f"seed {seed}  {what}: {number}  {bar}", highlight=False)
    if options.out is not None:
        options.out.write_text(markdown(found, options, at), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
