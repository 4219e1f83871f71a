"""The bars of sparse attention at `nano` size: recall of the indexer, bits per byte and needles against dense.

    python -m recipes.nano --out runs/nano                       # its data and its stages are used
    python -m benchmarks.dsa --recipe runs/nano --out docs/results/dsa.md
    python -m benchmarks.dsa --recipe runs/nano --quick          # the whole path in a minute or two, no result

Seed 0 is the recipe's own run; the others start from its pre-trained model and run its stages midtrain -> dsa1 -> dsa2
below `--work`. Beside dsa2 of every seed stands a dense continuation of midtrain on the same batches, for as many
steps, at the same rate. A run that is whole is measured, not run again. Printed, for every seed:

- recall after dsa1: attention mass of the indexer's top-k over that of the true top-k, held-out rows of 8 x index_topk
  (bar: 90% in the mean over layers) and of 32 x index_topk;
- bits per byte of held-out text, dsa2 with sparse attention against the dense continuation (bar: within 1%);
- needles at 32 x index_topk, the same two models, the same questions (bar: the 95% interval of the paired difference
  above -3 points; it counts where the dense model finds 90%). Every seed asks questions of its own, so that the
  answers of all seeds together are one sample: the bar is judged on them.

What was measured of a seed is kept below `--work`: seeds may run at different times, the last call prints them all.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

import glm5
from benchmarks.measure import machine
from glm5.cli.recipe_data import Layout
from glm5.data import open_dataset
from glm5.evals.needles import NeedleConfig, NeedleResult, find_needles
from glm5.files import write_json
from glm5.scoring import paired_difference
from glm5.text import Tokenizer
from glm5.train import MidtrainConfig, Phase, evaluate_bits_per_byte
from glm5.train.indexer_recall import measure_indexer_recall
from glm5.train.job import perform
from glm5.train.stages import job_of, shortened
from recipes.nano import nano_recipe


@dataclass
class Options:
    """Options of the benchmark."""

    recipe: Path
    """Directory of a run of `recipes.nano`."""
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
    found_dense: list[bool] = field(default_factory=list)
    """Per question, whether the dense continuation with dense attention finds the needle."""
    found_sparse: list[bool] = field(default_factory=list)
    """And dsa2 with sparse attention."""
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)


class Chain:
    """The runs of one seed: the recipe's stages, and the dense continuation."""

    def __init__(self, options: Options, seed: int, console: Console) -> None:
        self.options, self.console, self.seed = options, console, seed
        own = seed == 0 and not options.quick
        self.root = options.recipe if own else options.work / f"seed-{seed}"
        self.heldout = Layout(options.recipe).heldout
        self.tokenizer = Tokenizer.from_pretrained(options.recipe / "tokenizer")
        self.stages = nano_recipe(options.recipe, seed).stages

    def run(self) -> dict[str, Path]:
        """All runs of this seed, done or found; name -> model directory."""
        sparse, midtrain = self.stages["dsa2"], self.stages["midtrain"]
        assert isinstance(midtrain, MidtrainConfig)
        loop = dataclasses.replace(sparse.loop, indexer_optimizer=None)
        phase = Phase(length=sparse.length, rows=sparse.rows, steps=loop.steps)
        dense = dataclasses.replace(
            midtrain, train_data=sparse.train_data, phases=(phase,), loop=loop,
            mtp_weight=sparse.mtp_weight, mtp_steps=sparse.mtp_steps,
        )  # fmt: skip
        return {
            "midtrain": self.do("midtrain", midtrain, self.options.recipe / "pretrain"),
            "dsa1": self.do("dsa1", self.stages["dsa1"], self.root / "midtrain"),
            "dsa2": self.do("dsa2", sparse, self.root / "dsa1"),
            "dense": self.do("dense", dense, self.root / "midtrain"),
        }

    def do(self, name: str, config: Any, parent: Path) -> Path:
        """One stage; its model directory."""
        config = dataclasses.replace(config, parent=parent)
        if self.options.quick:
            config = shortened(config, 2)
        path = self.root / name
        resume = (path / "run.json").exists()
        return perform(job_of(config), path, resume=resume, console=self.console).model_directory

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
        asked: tuple[tuple[str, Literal["dense", "sparse"]], ...] = (
            ("dense", "dense"), ("dsa1", "sparse"), ("dsa2", "sparse"), ("dsa2", "dense"),
        )  # fmt: skip
        for name, attention in asked:
            label = f"{name}, {attention} attention"
            found.bits_per_byte[label] = evaluate_bits_per_byte(
                loaded[name].eval(),
                heldout,
                length=self.stages["dsa2"].length,
                rows=2,
                documents=documents,
                attention=attention,
            ).bits_per_byte
            config = NeedleConfig(
                lengths=(long,), per_cell=1 if self.options.quick else self.options.questions,
                attention=attention, rows=2, seed=1 + self.seed,
            )  # fmt: skip
            answers[label] = find_needles(loaded[name], self.tokenizer, heldout, config)
            found.needles[label] = str(answers[label].accuracy())
        found.found_dense, found.found_sparse = (
            [answer.correct for answer in answers[label].answers]
            for label in ("dense, dense attention", "dsa2, sparse attention")
        )
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
    rows = [
        (f"recall after dsa1, {at[0]} tokens", shown(short), "met" if short["mass"] >= 0.9 else "MISSED"),
        (f"recall after dsa1, {at[1]} tokens", shown(long), ""),
        ("bits per byte, sparse against dense", f"{sparse:.4f} / {dense:.4f} ({excess:+.2%})",
         "met" if excess <= 0.01 else "MISSED"),
        (f"needles at {at[1]}, sparse less dense", str(paired_difference(found.found_dense, found.found_sparse)), ""),
    ]  # fmt: skip
    rows += [(f"recall of {name}", shown(value), "") for name, value in found.recall.items() if "dsa1" not in name]
    rows += [(f"bits per byte, {name}", f"{value:.4f}", "") for name, value in found.bits_per_byte.items()]
    rows += [(f"needles, {name}", value, "") for name, value in found.needles.items()]
    rows += [(f"{name}: seconds, tokens/s of the last 20 steps", f"{found.seconds[name]:,}, {speed:,}", "")
             for name, speed in found.tokens_per_second.items()]  # fmt: skip
    return rows


def together(found: list[Measured], at: tuple[int, int]) -> tuple[str, str, str]:
    """The line of the needles of all seeds: (what, number, against its bar)."""
    dense = [hit for one in found for hit in one.found_dense]
    sparse = [hit for one in found for hit in one.found_sparse]
    difference, share = paired_difference(dense, sparse), sum(dense) / len(dense)
    bar = "not counted: the dense models find fewer than 90%"
    if share >= 0.9:
        bar = "met" if difference.low >= -0.03 else "MISSED"
    what = f"needles at {at[1]}, sparse less dense, {len(dense)} questions of {len(found)} seed(s); dense {share:.1%}"
    return what, str(difference), bar


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
    what, number, bar = together(found, at)
    parts += ["| what | found | bar |", "| --- | --- | --- |", f"| {what} | {number} | {bar} |", ""]
    for one in found:
        parts += [f"## Seed {one.seed}", "", "| what | found | bar |", "| --- | --- | --- |"]
        parts += [f"| {what} | {number} | {bar} |" for what, number, bar in lines(one, at)] + [""]
    return "\n".join(parts)


def measured(chain: Chain, models: dict[str, Path], options: Options) -> Measured:
    """The numbers of a seed, from an earlier call with the same questions where there was one."""
    scope = "quick" if options.quick else f"{options.questions}-{options.heldout_documents or 'all'}"
    path = options.work / f"measured-{chain.seed}-{scope}.json"
    if path.exists():
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    found = chain.measure(models)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(found))
    return found


def main(options: Options) -> None:
    """Runs what is missing, measures, prints and writes."""
    torch.set_num_threads(options.threads)
    console = Console()
    found, at = [], (0, 0)
    for seed in options.seeds:
        chain = Chain(options, seed, console)
        models = chain.run()
        at = lengths(glm5.ModelConfig.from_pretrained(models["dsa1"]).index_topk, options.quick)
        found.append(measured(chain, models, options))
        for what, number, bar in lines(found[-1], at):
            console.print(f"seed {seed}  {what}: {number}  {bar}", highlight=False)
    what, number, bar = together(found, at)
    console.print(f"{what}: {number}  {bar}", highlight=False)
    if options.out is not None:
        options.out.write_text(markdown(found, options, at), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
