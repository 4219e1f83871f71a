"""Peak memory of training steps on this machine against what `glm5 plan --train` says before the start.

    python -m benchmarks.memory --out docs/results/memory.md
    python -m benchmarks.memory --presets nano --lengths 256 --optimizers adamw

Each case runs in a process of its own: the model in fp32, its optimiser, and two steps of pre-training (dense
attention, one draft step, balance loss) on one packed row of random tokens; the second step finds the optimiser's state
in place. The peak is `VmHWM`, which counts all that was ever resident. The C library is told to give large blocks back
at once (`GIVING_BACK`): left to itself it keeps up to a fifth more, another share in every run. The peak is compared
twice: whole, and without what the process holds after a step of a tiny model, which is the harder comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.measure import machine
from glm5.config import ModelConfig
from glm5.data import Batch
from glm5.model import GLM5
from glm5.optim import OptimizerConfig
from glm5.planner import TrainingPlan, hardware_from, host_training_memory
from glm5.train.loop import LoopConfig, Stage, compute, prepare, update
from glm5.train.losses import language_loss

BOUND = 0.15
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
"""Environment of the measured processes: a fixed threshold above which a block has a mapping of its own."""


@dataclass
class Options:
    """Options of the comparison."""

    presets: tuple[str, ...] = ("nano", "micro")
    lengths: tuple[int, ...] = (256, 2048, 4096)
    optimizers: tuple[str, ...] = ("adamw", "muon")
    checkpointing: tuple[bool, ...] = (False, True)
    largest: float = 6.0
    """Cases for which the planner says more GB than this are left out."""
    json: bool = False
    """Print the cases as one JSON list instead of a table."""
    child: bool = False
    """Run the one case given and print its memory: what each process of the comparison does."""
    out: Path | None = None
    """Write the table there as Markdown."""


@dataclass(frozen=True)
class Case:
    """One training set-up, its planned and its measured bytes."""

    preset: str
    length: int
    optimizer: str
    checkpointing: bool
    planned: float
    planned_process: float
    measured: float
    measured_process: float

    @property
    def error(self) -> float:
        """Of the whole peak, relative to what was measured."""
        return self.planned / self.measured - 1

    @property
    def error_without_process(self) -> float:
        """The same without what the process holds before the model is made."""
        return (self.planned - self.planned_process) / (self.measured - self.measured_process) - 1


def peak_bytes() -> int:
    """`VmHWM` of this process; unlike ru_maxrss it does not start at the parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def train_two_steps(config: ModelConfig, length: int, optimizer: str, checkpointing: bool) -> int:
    """Peak bytes of the process after two steps of pre-training on one packed row."""
    ids_BT = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids_BT, ids_BT.roll(-1, 1), (torch.arange(length) // max(1, length // 2))[None])
    loss = functools.partial(language_loss, attention="dense", mtp_weight=0.3, balance_weight=1e-4)
    loop = LoopConfig(steps=2, optimizer=OptimizerConfig(name=optimizer), checkpoint_activations=checkpointing)  # type: ignore[arg-type]
    model = GLM5(config)
    stage = Stage(name="memory", loader=None, loss=loss, learns=lambda name: ".indexer." not in name)  # type: ignore[arg-type]
    optimizers = prepare(stage, model, loop)
    for _ in range(loop.steps):
        found = compute(stage, model, batch, loop)
        update(model, optimizers, found.loads, loop)
        model.zero_grad(set_to_none=True)
    return peak_bytes()


def tiny() -> ModelConfig:
    """A model whose own memory is nothing: its step loads the libraries that any step needs."""
    nano = ModelConfig.from_preset("nano")
    return dataclasses.replace(nano, vocab_size=256, hidden_size=32, n_routed_experts=4, moe_intermediate_size=16)


def compare(preset: str, length: int, optimizer: str, checkpointing: bool, largest: float) -> Case | None:
    """The plan and the measured peak of one case; None where the plan is beyond `largest` GB."""
    plan = TrainingPlan(
        optimizer=optimizer, shard="none", sequence=length, checkpointing=checkpointing, precision="fp32"
    )
    planned = host_training_memory(ModelConfig.from_preset(preset), plan, hardware_from("CPU24GB"))
    if planned.total.value > largest * 1e9:
        return None
    command = [sys.executable, "-m", "benchmarks.memory", "--child", "--presets", preset, "--lengths", str(length),
               "--optimizers", optimizer, "--checkpointing", str(checkpointing)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **GIVING_BACK})
    found = json.loads(done.stdout.splitlines()[-1])
    return Case(preset, length, optimizer, checkpointing, planned.total.value, planned.process.value, found["peak"],
                found["process"])  # fmt: skip


def main() -> None:
    options = tyro.cli(Options)
    grid = [(p, t, o, c) for p in options.presets for t in options.lengths for o in options.optimizers
            for c in options.checkpointing]  # fmt: skip
    if options.child:
        torch.set_num_threads(1)
        preset, length, optimizer, checkpointing = grid[0]
        process = train_two_steps(tiny(), 16, optimizer, checkpointing)
        peak = train_two_steps(ModelConfig.from_preset(preset), length, optimizer, checkpointing)
        print(json.dumps({"process": process, "peak": peak}))
        return
    cases: list[Case] = []
    for case in (compare(*point, options.largest) for point in grid):
        if case is not None:
            cases.append(case)
            print(" | ".join(row(case)), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps([vars(case) | {"error": case.error} for case in cases]))
        return
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in [HEADER, ["---"] * len(HEADER), *map(row, cases)])
    print(body)
    if options.out is not None:
        facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
        text = (
            f"# Memory of a training step: planned and measured\n\n`python -m benchmarks.memory`\n\n{facts}\n\n{body}\n"
        )
        options.out.write_text(text, encoding="utf-8")


HEADER = ["preset", "T", "optimiser", "activation checkpointing", "planned, MB", "measured, MB", "error",
          "error without the process", "within 15%"]  # fmt: skip


def row(case: Case) -> list[str]:
    met = "yes" if abs(case.error) <= BOUND else "NO"
    return [case.preset, f"{case.length:,}", case.optimizer, "on" if case.checkpointing else "off",
            f"{case.planned / 1e6:,.0f}", f"{case.measured / 1e6:,.0f}", f"{case.error:+.1%}",
            f"{case.error_without_process:+.1%}", met]  # fmt: skip


if __name__ == "__main__":
    main()
