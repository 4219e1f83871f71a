"""Ablations of the training recipe at `nano` size, three seeds each, on the quickstart's text.

    python -m benchmarks.recipe --out docs/results/recipe.md       # about 35 minutes of one core
    python -m benchmarks.recipe --quick                            # a few minutes: does it run, not what it says

What is compared: Muon split per head (GLM-5 report, section 2.1) with Muon on whole matrices and with AdamW; no
multi-token prediction with one and with three trained draft steps; experts with a dense model of the same
architecture, at equal active weights and at equal processor time. One optimiser differs from another in the matrices
inside the layers only; embeddings, head and norms are AdamW's at one rate in every arm. Each optimiser (and the dense
model) gets the best rate of a small sweep of its own, widened until the best is not at its edge; it is printed.

Held-out bits per byte are those of the main head. Accept length is measured by real greedy speculation: after a
held-out prefix the shared MTP module drafts three tokens from its own drafts, and the model then says greedily what it
would have said; accepted drafts plus the model's own token are one step's yield. Time is processor time, because other
work may share the machine. Every finished run is a JSON file under --work: a second call goes on, and prints the same
table. Seeds are the outer loop, so an interrupted study still compares all arms.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.measure import machine
from glm5.config import ModelConfig
from glm5.data import Loader, TokenDataset
from glm5.files import write_json
from glm5.model import GLM5, initialize_
from glm5.optim import OptimizerConfig, Schedule, rate_at, set_rate
from glm5.optim.muon import Muon, whole
from glm5.train.evaluate import evaluate_bits_per_byte
from glm5.train.loop import LoopConfig, Stage, compute, prepare, update
from glm5.train.losses import language_loss
from recipes.text import quickstart_text

ROWS, LENGTH = 8, 256
EMBEDDING_RATE = 0.048
"""Peak rate of embeddings, head and norms in every arm: that of the quickstart."""
SCHEDULE = Schedule(shape="cosine", warmup_steps=10, final_fraction=0.1)
DRAFTS = 3


@dataclass
class Options:
    """Options of the ablations."""

    steps: int = 80
    """Steps of 8 rows of 256 tokens in every arm."""
    sweep_steps: int = 30
    """Steps of each run that only looks for a rate."""
    seeds: int = 3
    documents: int = 40
    """Held-out documents that are scored."""
    prefixes: int = 256
    """Held-out prefixes after which drafts are tried."""
    threads: int = 1
    quick: bool = False
    """Few steps and two rates: a check that all of it runs."""
    work: Path = Path("runs/recipe")
    """Corpus, tokenizer and finished runs."""
    out: Path | None = None
    """Write the table there as Markdown."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training."""

    name: str
    optimizer: str = "muon split"
    mtp_steps: int = 0
    dense: bool = False
    times: float = 1.0
    """Steps as a multiple of the other arms' steps."""


SPLIT, PLAIN, ADAMW = Arm(name="Muon split"), Arm(name="Muon", optimizer="muon"), Arm(name="AdamW", optimizer="adamw")
DENSE = Arm(name="dense", dense=True)
RATES = {
    SPLIT: [4e-3, 8e-3, 1.6e-2],
    PLAIN: [4e-3, 8e-3, 1.6e-2],
    ADAMW: [2e-3, 4e-3, 8e-3],
    DENSE: [4e-3, 8e-3, 1.6e-2],
}


def model_config(arm: Arm, vocabulary: int = 4096) -> ModelConfig:
    """`nano`, with an MTP module only where it is trained; or the same with dense layers of as many active weights."""
    nano = dataclasses.replace(ModelConfig.from_preset("nano"), num_nextn_predict_layers=1 if arm.mtp_steps else 0)
    if not arm.dense:
        return nano
    plain = dataclasses.replace(nano, first_k_dense_replace=nano.num_hidden_layers, mlp_layer_types=())
    wanted = nano.num_parameters(active=True)
    made = [dataclasses.replace(plain, intermediate_size=inner) for inner in range(128, 768, 8)]
    return min(made, key=lambda config: abs(config.num_parameters(active=True) - wanted))


def optimizer_config(arm: Arm, rate: float) -> OptimizerConfig:
    """The optimiser of an arm at a peak rate of its matrices."""
    name = "adamw" if arm.optimizer == "adamw" else "muon"
    return OptimizerConfig(name=name, lr=rate, embedding_lr_scale=EMBEDDING_RATE / rate)  # type: ignore[arg-type]


def unsplit(optimizers: list[torch.optim.Optimizer]) -> None:
    """Plain Muon: each matrix of the model as one; stacked experts are separate matrices all the same."""
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            optimizer._splits = {p: whole if p.ndim == 2 else cut for p, cut in optimizer._splits.items()}


def train(arm: Arm, rate: float, steps: int, seed: int, data: TokenDataset) -> tuple[GLM5, float, float]:
    """A model trained for `steps`; the processor seconds it took; the mean loss of the last tenth."""
    model = GLM5(model_config(arm))
    initialize_(model, model.config.initializer_range, seed=seed)
    model.mtp_steps = arm.mtp_steps
    loss = functools.partial(
        language_loss, attention="dense", mtp_weight=0.3 if arm.mtp_steps else 0.0, balance_weight=1e-4
    )
    loader = Loader(data, rows=ROWS, length=LENGTH, seed=seed)
    stage = Stage(name=arm.name, loader=loader, loss=loss, learns=lambda name: ".indexer." not in name)
    config = LoopConfig(steps=steps, optimizer=optimizer_config(arm, rate), schedule=SCHEDULE)
    optimizers = prepare(stage, model, config)
    if arm.optimizer == "muon":
        unsplit(optimizers)
    losses: list[float] = []
    started = time.process_time()
    for step in range(steps):
        set_rate(optimizers, rate_at(config.schedule, step, steps))
        found = compute(stage, model, loader.batch(step), config)
        update(model, optimizers, found.loads, config)
        model.zero_grad(set_to_none=True)
        losses.append(found.parts["lm"])
    tail = losses[-max(1, steps // 10) :]
    return model.eval(), time.process_time() - started, sum(tail) / len(tail)


# ---- drafts ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def accept_lengths(model: GLM5, prefixes_BT: torch.Tensor) -> torch.Tensor:
    """Tokens [B] that one step of greedy speculation with `DRAFTS` drafts yields after each prefix: 1 to DRAFTS + 1.

    The main model says token T. The shared module drafts T + 1, T + 2, ... each from its own state and its own draft
    before; a draft counts while it and all before it are what the main model says greedily after the same tokens.
    """
    trained, model.mtp_steps = model.mtp_steps, 0
    ids_BT, last = prefixes_BT, prefixes_BT.shape[1] - 1
    said_B = model(ids_BT, attention="dense", logits_to_keep=1).logits[:, -1].argmax(-1)
    alive_B = torch.ones_like(said_B, dtype=torch.bool)
    yielded_B = torch.ones_like(said_B)
    for draft in range(DRAFTS):
        ids_BT = torch.cat((ids_BT, said_B[:, None]), dim=1)
        model.mtp_steps = draft + 1
        out = model(ids_BT, attention="dense", collect={"mtp"})
        drafted_B = out.mtp_logits[draft][:, last].argmax(-1)
        alive_B &= drafted_B == out.logits[:, -1].argmax(-1)
        yielded_B += alive_B
        said_B = drafted_B
    model.mtp_steps = trained
    return yielded_B


def accept_length(model: GLM5, heldout: TokenDataset, count: int, length: int = 64) -> float:
    """Mean of `accept_lengths` over `count` prefixes, spread over the held-out documents."""
    documents = [i for i in range(len(heldout)) if heldout.lengths[i] > length]
    found = []
    for first in range(0, count, 64):
        starts = [
            (documents[n % len(documents)], n // len(documents) * 37) for n in range(first, min(first + 64, count))
        ]
        rows = [heldout.ids(d, s, s + length) if s + length < heldout.lengths[d] else heldout.ids(d, 0, length)
                for d, s in starts]  # fmt: skip
        found.append(accept_lengths(model, torch.tensor([row.tolist() for row in rows])))
    return torch.cat(found).double().mean().item()


# ---- the runs -------------------------------------------------------------------------------------------------------
class Study:
    """Trains what is not yet under `work`, and remembers what is."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.train_data, self.heldout = quickstart_text(options.work)

    def run(self, arm: Arm, rate: float, seed: int, *, sweep: bool = False) -> dict[str, Any]:
        """The finished run of an arm: bits per byte, processor seconds, accept length."""
        o = self.options
        steps = o.sweep_steps if sweep else round(o.steps * arm.times)
        kind = "sweep" if sweep else "run"
        file = o.work / "runs" / f"{kind} {arm.name}, rate {rate:g}, {steps} steps, seed {seed}.json"
        if not file.exists():
            model, seconds, loss = train(arm, rate, steps, seed, self.train_data)
            documents = o.documents // 2 if sweep else o.documents
            found = evaluate_bits_per_byte(model, self.heldout, length=LENGTH, documents=documents)
            values: dict[str, Any] = {"arm": arm.name, "rate": rate, "steps": steps, "seed": seed, "train_loss": loss,
                                      "cpu_seconds": seconds, "bits_per_byte": found.bits_per_byte}  # fmt: skip
            if arm.mtp_steps and not sweep:
                values["accept_length"] = accept_length(model, self.heldout, o.prefixes)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, values)
            print(json.dumps(values), flush=True)
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return kept

    def best_rate(self, arm: Arm) -> tuple[float, dict[float, float]]:
        """The rate with the lowest held-out bits per byte after the sweep's steps, and the whole sweep."""
        rates = RATES[arm][:2] if self.options.quick else RATES[arm]
        scores = {rate: self.run(arm, rate, seed=100, sweep=True)["bits_per_byte"] for rate in rates}
        while not self.options.quick and len(scores) < 6:
            best = min(scores, key=scores.__getitem__)
            if min(scores) < best < max(scores):
                break
            wider = best / 2 if best == min(scores) else best * 2
            scores[wider] = self.run(arm, wider, seed=100, sweep=True)["bits_per_byte"]
        return min(scores, key=scores.__getitem__), dict(sorted(scores.items()))

    def time_ratio(self, steps: int = 8) -> float:
        """Processor seconds of a step of experts over one of the dense model; steps in turn."""
        file = self.options.work / "runs" / "time ratio.json"
        if not file.exists():
            pairs = [[train(arm, 1e-3, 2, 0, self.train_data)[1] for arm in (SPLIT, DENSE)] for _ in range(steps)]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"ratio": statistics.median(a / b for a, b in pairs)})
        return float(json.loads(file.read_text(encoding="utf-8"))["ratio"])


# ---- the table ------------------------------------------------------------------------------------------------------
HEADER = ["arm", "peak rate", "steps", "held-out bits per byte", "against Muon split", "accept length", "CPU seconds"]


def spread(values: Iterable[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    listed = list(values)
    deviation = statistics.stdev(listed) if len(listed) > 1 else math.nan
    return f"{statistics.mean(listed):.{digits}f} ± {deviation:.{digits}f}"


def line(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[str]:
    """One arm; the difference is taken seed by seed, because a seed fixes the data's order and the first weights."""
    differences = [run["bits_per_byte"] - other["bits_per_byte"] for run, other in zip(runs, base, strict=True)]
    accepted = [run["accept_length"] for run in runs if "accept_length" in run]
    return [
        name, f"{runs[0]['rate']:g}", str(runs[0]["steps"]), spread((r["bits_per_byte"] for r in runs), 4),
        "" if runs is base else spread(differences, 4), spread(accepted, 3) if accepted else "",
        spread((r["cpu_seconds"] for r in runs), 0),
    ]  # fmt: skip


def study(options: Options) -> tuple[list[list[str]], dict[str, Any]]:
    """The table's lines, and what a reader needs beside them."""
    do = Study(options)
    sweeps: dict[str, Any] = {}
    rates: dict[str, float] = {}
    for arm in (SPLIT, PLAIN, ADAMW, DENSE):
        rates[arm.name], sweep = do.best_rate(arm)
        sweeps[arm.name] = {f"{rate:g}": round(score, 4) for rate, score in sweep.items()}
    ratio = do.time_ratio()
    arms = {
        "Muon split, experts, no MTP": (SPLIT, SPLIT),
        "Muon on whole matrices": (PLAIN, PLAIN),
        "AdamW": (ADAMW, ADAMW),
        "MTP, 1 trained draft step": (Arm(name="MTP 1", mtp_steps=1), SPLIT),
        f"MTP, {DRAFTS} trained draft steps": (Arm(name=f"MTP {DRAFTS}", mtp_steps=DRAFTS), SPLIT),
        "dense, equal active weights and steps": (DENSE, DENSE),
        "dense, equal processor time": (Arm(name="dense, longer", dense=True, times=round(ratio, 2)), DENSE),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        for name, (arm, tuned) in arms.items():
            runs[name].append(do.run(arm, rates[tuned.name], seed))
    base = next(iter(runs.values()))
    lines = [line(name, found, base) for name, found in runs.items()]
    facts = {**machine(), "seeds": options.seeds, "tokens per step": ROWS * LENGTH, "sweeps": sweeps,
             "a step of experts over a step of the dense model, processor time": round(ratio, 2),
             "active weights": model_config(SPLIT).num_parameters(active=True),
             "active weights, dense": model_config(DENSE).num_parameters(active=True),
             "weights": model_config(SPLIT).num_parameters()}  # fmt: skip
    return lines, facts


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    if options.quick:
        options = dataclasses.replace(options, steps=6, sweep_steps=3, seeds=2, documents=4, prefixes=16)
    lines, facts = study(options)
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in [HEADER, ["---"] * len(HEADER), *lines])
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    print(body, listed, sep="\n\n")
    if options.out is not None:
        command = f"python -m benchmarks.recipe --steps {options.steps} --sweep-steps {options.sweep_steps}"
        text = f"# Ablations of the recipe at `nano` size\n\n`{command}`\n\n{NOTE}\n\n{listed}\n\n{body}\n"
        options.out.write_text(text, encoding="utf-8")


NOTE = (
    "Mean ± standard deviation over the seeds. Differences are taken seed by seed (above 0: worse than Muon split).\n"
    "A sweep lists the held-out bits per byte of one seed at each peak rate; the best rate is used. All arms see the\n"
    "same batches of the same seed; fp32, dense attention, rows of 256 tokens."
)


if __name__ == "__main__":
    main()
