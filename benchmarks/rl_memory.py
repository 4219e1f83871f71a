"""Peak memory of one update of the RL learner at the published vocabulary, by how many logits it holds at once.

    python -m benchmarks.rl_memory --out docs/results/rl_memory.md
    python -m benchmarks.rl_memory --mib 64 --tokens 512

Each case is a process of its own: a model of the nano preset's widths with the vocabulary of GLM-5 (154,880), one row
of which `trained` tokens were sampled, one update without an optimiser step. "all at once" is the plain path: logits of
all these tokens, of the draft module too, which learns beside the policy as by default. The peak is `VmHWM` less what
the process held before the update; the gradients, of which the two matrices of the vocabulary are nearly all, are
taken off in the next column. Loss and gradient norm are compared with those of the plain path.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.measure import agreement, machine, status_bytes
from glm5.config import ModelConfig
from glm5.model import GLM5
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.objective import Given
from glm5.rl.packing import Example
from glm5.rl.records import Trajectory

VOCABULARY = 154_880
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
"""Environment of the measured processes: the C library gives large blocks back at once."""


@dataclass
class Options:
    """Options of the comparison."""

    tokens: int = 2048
    """Of the row."""
    trained: int = 1024
    """Of these tokens, the last ones."""
    mib: tuple[int, ...] = (1 << 20, 1024, 256, 64)
    """`learner.logits_mib` of the cases; the first is the plain path."""
    out: Path | None = None
    """Write the table there as Markdown."""
    child: bool = False
    """Run the first case and print it: what each process of the comparison does."""


@dataclass(frozen=True)
class Case:
    """What one process found."""

    mib: int
    peak: int
    """Bytes, less those before the update."""
    gradients: int
    seconds: float
    """Of the processor."""
    loss: float
    norm: float


def measured(options: Options) -> Case:
    """The case of `options.mib[0]`, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = dataclasses.replace(ModelConfig.from_preset("nano"), vocab_size=VOCABULARY)
    learner = Learner(GLM5(config), LearnerConfig(logits_mib=options.mib[0], pass_tokens=options.tokens))
    example = example_of(options.tokens, options.trained)
    before, started = status_bytes("VmRSS"), time.process_time()
    values = learner.backward([example], Given())
    seconds, peak = time.process_time() - started, status_bytes("VmHWM") - before
    grads = [p.grad for p in learner.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).item()
    return Case(options.mib[0], peak, sum(g.nbytes for g in grads), seconds, values["loss"], norm)


def example_of(tokens: int, trained: int) -> Example:
    """A row of random tokens whose last ones were sampled."""
    ids = torch.randint(0, VOCABULARY, (tokens,)).tolist()
    first = tokens - trained
    flags = tuple(i >= first for i in range(tokens))
    # As a policy that knows nothing would say of them, so that no ratio is out of range.
    logprobs = tuple(-torch.tensor(VOCABULARY).log().item() if flag else 0.0 for flag in flags)
    trajectory = Trajectory(tuple(ids), flags, logprobs, tuple(0 if flag else -1 for flag in flags))
    return Example(trajectory, 1.0, 1 / trained, 1.0, "random", tuple(range(first, tokens)), (0,) * trained)


def in_a_process(options: Options, mib: int) -> Case:
    """One case."""
    command = [sys.executable, "-m", "benchmarks.rl_memory", "--child", "--mib", str(mib),
               "--tokens", str(options.tokens), "--trained", str(options.trained)]  # fmt: skip
    done = subprocess.run(command, env=os.environ | GIVING_BACK, stdout=subprocess.PIPE, text=True, check=True)
    return Case(**json.loads(done.stdout.splitlines()[-1]))


def table(options: Options, cases: list[Case]) -> str:
    """Markdown."""
    plain = cases[0]
    lines = [
        *(f"- {name}: {value}" for name, value in machine().items()),
        f"- {options.tokens:,} tokens, {options.trained:,} of them learnt from; vocabulary {VOCABULARY:,}",
        "",
        "| `learner.logits_mib` | peak of the update, GB | without gradients, GB | CPU seconds | loss, norm |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        name = "all at once" if case is plain else f"{case.mib:,}"
        over = (case.peak - case.gradients) / 1e9
        same = agreement((case.loss, case.norm), (plain.loss, plain.norm))
        same = f"{case.loss:.6f}, {case.norm:.6f}" if case is plain else same
        lines.append(f"| {name} | {case.peak / 1e9:.2f} | {over:.2f} | {case.seconds:.1f} | {same} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Prints the table."""
    if options.child:
        print(json.dumps(dataclasses.asdict(measured(options))))
        return
    found = table(options, [in_a_process(options, mib) for mib in options.mib])
    print(found)
    if options.out is not None:
        options.out.write_text(f"# Memory of an RL update\n\n`python -m benchmarks.rl_memory`\n\n{found}\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
