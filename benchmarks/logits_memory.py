"""Peak memory and time of a training step at the published vocabulary, by how many logits it holds at once.

    python -m benchmarks.logits_memory --out docs/results/logits_memory.md
    python -m benchmarks.logits_memory --mib 64 --tokens 512 --repeats 1

Each case is a process of its own: a model of the nano preset's widths with the vocabulary of GLM-5 (154,880), one row,
forward and backward of the pre-training loss (dense attention, draft steps, balance) without an optimiser step. "all at
once" is the plain path. The peer is PyTorch's `linear_cross_entropy` on the same states in pieces of the same size; it
makes its gradients going forward, so the head runs once. The peak is `VmHWM` less what the process held before; the
gradients, of which the two matrices of the vocabulary are nearly all, are taken off in the next column. Loss and
gradient norm are compared with those of the plain path.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from benchmarks.measure import agreement, machine, status_bytes
from benchmarks.memory import GIVING_BACK
from glm5.config import ModelConfig
from glm5.data import IGNORED, Batch
from glm5.model import GLM5, logits_in
from glm5.train.loop import LoopConfig, Stage, compute, prepare
from glm5.train.losses import Counts, Loss, balance_loss, language_loss, mtp_targets

VOCABULARY = 154_880
MTP, BALANCE = 0.3, 1e-4


@dataclass
class Options:
    """Options of the comparison."""

    tokens: int = 2048
    """Of the row."""
    drafts: int = 1
    """Draft steps, each with a head of its own over all tokens."""
    mib: tuple[int, ...] = (1 << 20, 256, 64)
    """`loop.logits_mib` of the cases; the first is the plain path."""
    peer_mib: tuple[int, ...] = (256,)
    """Of PyTorch's."""
    repeats: int = 2
    """Steps of a case; the peak is that of all."""
    out: Path | None = None
    """Write the table there as Markdown."""
    child: bool = False
    """Run the first case and print it: what each process of the comparison does."""
    peer: bool = False
    """That case is PyTorch's."""


@dataclass(frozen=True)
class Case:
    """What one process found."""

    mib: int
    peer: bool
    peak: int
    """Bytes, less those before the first step."""
    gradients: int
    seconds: tuple[float, ...]
    """Of the processor, of each step."""
    loss: float
    norm: float


def pytorch_loss(model: GLM5, batch: Batch, counts: Counts, *, most: int) -> Loss:
    """The same loss, of which PyTorch applies the heads."""
    collect = {"router", "states"} | ({"mtp"} if model.mtp_steps else set())
    output = model(batch.input_ids_BT, None, batch.segment_ids_BT, attention="dense", collect=collect)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=max(most // VOCABULARY, 1), chunking_method=None)

    def head(ahead: int, targets_BT: Tensor) -> Tensor:
        nats: Tensor = F.linear_cross_entropy(
            output.states[ahead].flatten(0, 1), model.lm_head.weight, targets_BT.flatten(), reduction="sum",
            ignore_index=IGNORED, options=options,
        )  # fmt: skip
        return nats / counts.targets(ahead)

    total = head(0, batch.targets_BT) + BALANCE * balance_loss(output, counts)
    for step in range(output.drafts):
        total = total + MTP / output.drafts * head(step + 1, mtp_targets(batch, step))
    return Loss(total, {}, output.router)


def measured(options: Options) -> Case:
    """The case of `options.mib[0]`, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GLM5(dataclasses.replace(ModelConfig.from_preset("nano"), vocab_size=VOCABULARY))
    model.mtp_steps = options.drafts
    most, weight = logits_in(options.mib[0]), MTP if options.drafts else 0.0
    loss = functools.partial(language_loss, attention="dense", mtp_weight=weight, balance_weight=BALANCE, most=most)
    stage = Stage(
        name="memory", loader=None, loss=functools.partial(pytorch_loss, most=most) if options.peer else loss,  # type: ignore[arg-type]
        learns=lambda name: ".indexer." not in name and (options.drafts > 0 or not name.startswith("mtp.")),
    )  # fmt: skip
    loop = LoopConfig(steps=1, clip_norm=1e9)
    prepare(stage, model, loop)
    ids_BT = torch.randint(0, VOCABULARY, (1, options.tokens + 1))
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], torch.zeros_like(ids_BT[:, :-1]))
    before, seconds = status_bytes("VmRSS"), []
    for _ in range(options.repeats):
        model.zero_grad(set_to_none=True)
        started = time.process_time()
        found = compute(stage, model, batch, loop)
        seconds.append(time.process_time() - started)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return Case(
        options.mib[0], options.peer, status_bytes("VmHWM") - before, gradients, tuple(seconds), found.loss,
        found.grad_norms["grad_norm"],
    )  # fmt: skip


def in_a_process(options: Options, mib: int, *, peer: bool = False) -> Case:
    """One case."""
    command = [sys.executable, "-m", "benchmarks.logits_memory", "--child", "--mib", str(mib), "--tokens",
               str(options.tokens), "--drafts", str(options.drafts), "--repeats", str(options.repeats),
               "--peer" if peer else "--no-peer"]  # fmt: skip
    done = subprocess.run(command, env=os.environ | GIVING_BACK, stdout=subprocess.PIPE, text=True, check=True)
    return Case(**json.loads(done.stdout.splitlines()[-1]))


def table(options: Options, cases: list[Case]) -> str:
    """Markdown."""
    plain = cases[0]
    lines = [
        *(f"- {name}: {value}" for name, value in machine().items()),
        f"- a row of {options.tokens:,} tokens, {options.drafts} draft step(s); vocabulary {VOCABULARY:,}",
        f"- CPU seconds: median of {options.repeats} steps (fastest to slowest)",
        "",
        "| `loop.logits_mib` | peak of the step, GB | without gradients, GB | CPU seconds | loss, norm |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        name = "all at once" if case is plain else f"{case.mib:,}"
        name = f"PyTorch's `linear_cross_entropy`, pieces of {case.mib:,} MiB" if case.peer else name
        same = agreement((case.loss, case.norm), (plain.loss, plain.norm))
        same = f"{case.loss:.6f}, {case.norm:.6f}" if case is plain else same
        over = (case.peak - case.gradients) / 1e9
        times = f"{statistics.median(case.seconds):.1f} ({min(case.seconds):.1f} to {max(case.seconds):.1f})"
        lines.append(f"| {name} | {case.peak / 1e9:.2f} | {over:.2f} | {times} | {same} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Prints the table."""
    if options.child:
        print(json.dumps(dataclasses.asdict(measured(options))))
        return
    cases = [in_a_process(options, mib) for mib in options.mib]
    found = table(options, cases + [in_a_process(options, mib, peer=True) for mib in options.peer_mib])
    print(found)
    if options.out is not None:
        text = f"# Memory of the logits in a training step\n\n`python -m benchmarks.logits_memory`\n\n{found}\n"
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
