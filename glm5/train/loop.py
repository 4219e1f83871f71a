"""THE training loop. A stage is data, a loss, what learns, and a schedule; everything else is here, once.

Exact by construction: a batch is a function of the step, the learning rate is a function of the step, nothing draws
random numbers from a hidden state. A checkpoint is therefore weights, optimiser state and a step number, and a run that
was killed and resumed gives the same bits as one that was not. Left out: ranks, micro-batches, asynchronous saving.
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from glm5.data import Batch, Loader
from glm5.errors import RunError
from glm5.files import replacing
from glm5.model import GLM5, RouterRecord
from glm5.optim import OptimizerConfig, Schedule, build_optimizers, rate_at, set_rate, update_router_bias
from glm5.train.checks import check_choice, check_counts, check_numbers
from glm5.train.losses import Loss
from glm5.train.run_directory import RunDirectory

SPIKE_WINDOW = 20
LOWER_RATE = "start a new run with a lower learning rate"


class RunInterrupted(RunError):
    """The user stopped a run; it is saved and can go on."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every stage sets: length, optimiser, schedule, and how often things are written."""

    steps: int
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float = 1.0
    router_bias_rate: float = 1e-3
    """Step of the router's correction bias; 0 leaves it alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast over fp32 weights. A little faster on a CPU, at `nano` size too."""
    spike_factor: float | None = 3.0
    """Stop when the loss is this many times the median of the last 20 steps; None lets it pass."""
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    """Steps between evaluations and samples; 0: only after the last step."""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "checkpoint_every", "keep_checkpoints")
        check_counts(self, "seed", "evaluate_every", least=0)
        check_numbers(self, "clip_norm", above=0)
        check_numbers(self, "router_bias_rate")
        if self.spike_factor is not None:
            check_numbers(self, "spike_factor", above=1)
        check_choice(self, "precision", "fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What makes one stage different from another."""

    name: str
    loader: Loader
    loss: Callable[[GLM5, Batch], Loss]
    learns: Callable[[str], bool] = lambda name: True
    """Whether the parameter of that name is trained; the others are frozen."""
    evaluate: Callable[[GLM5], dict[str, float]] | None = None
    """Values that join the metrics of the step."""
    sample: Callable[[GLM5], str] | None = None
    """Text for `samples/`."""


def train(stage: Stage, model: GLM5, run: RunDirectory, config: LoopConfig, *, console: Console | None = None) -> None:
    """Trains `model` in place from the run's newest checkpoint (or from what it holds) to the last step.

    Ctrl-C finishes the step, saves and raises RunInterrupted. A loss that is not finite, or a spike, raises RunError
    before the weights take the step.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.learns(name))
    optimizers = build_optimizers(model, model.config, config.optimizer)
    first = run.load_checkpoint(model, optimizers)
    run.rewind(first)
    recent = [values["loss"] for values in run.read("metrics")][-SPIKE_WINDOW:]
    biases = router_biases(model)
    model.train()

    with progress_bar(stage.name, first, config.steps, console) as show, interrupts() as stopped:
        for step in range(first, config.steps):
            started = time.perf_counter()
            fraction = rate_at(config.schedule, step, config.steps)
            set_rate(optimizers, fraction)
            batch = stage.loader.batch(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                loss = stage.loss(model, batch)
            value = loss.total.item()
            check_loss(value, recent, step, stage, config)
            loss.total.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained(model), config.clip_norm).item()
            if not math.isfinite(norm):
                raise unhealthy(f"The gradient norm of {stage.name} is {norm}", step, stage, LOWER_RATE)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if config.router_bias_rate:
                for layer, load_E in expert_loads(loss.router).items():
                    update_router_bias(biases[layer], load_E, config.router_bias_rate)
            recent = [*recent, value][-SPIKE_WINDOW:]

            values: dict[str, Any] = {"step": step, "loss": value, **{k: v.item() for k, v in loss.parts.items()}}
            values |= {"grad_norm": norm, "rate": fraction * config.optimizer.lr, **busiest_expert(loss.router)}
            last = step + 1 == config.steps
            seconds = time.perf_counter() - started
            if last or (config.evaluate_every and (step + 1) % config.evaluate_every == 0):
                values |= observe(stage, model, run.path / "samples" / f"step-{step + 1:08d}.txt")
            run.append("metrics", values)
            tokens = batch.input_ids_BT.numel()
            run.append(
                "speed", {"step": step, "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds)}
            )
            show(step + 1, f"loss {value:.3f}", tokens / seconds)
            stop = stopped()
            if last or stop or (step + 1) % config.checkpoint_every == 0:
                run.save_checkpoint(step + 1, model, optimizers, keep=config.keep_checkpoints)
            if stop and not last:
                raise RunInterrupted(
                    f"Stopped after step {step + 1} of {config.steps} of {stage.name}; all is saved in {run.path}. "
                    "Run the same command with --resume to go on."
                )


def check_loss(value: float, recent: list[float], step: int, stage: Stage, config: LoopConfig) -> None:
    """Raises RunError, with the batch's number, for a loss that no healthy run has."""
    if not math.isfinite(value):
        raise unhealthy(f"The loss of {stage.name} is {value}", step, stage, LOWER_RATE)
    if config.spike_factor and len(recent) == SPIKE_WINDOW and value > config.spike_factor * statistics.median(recent):
        problem = f"The loss of {stage.name} jumped to {value:.3f} from a median of {statistics.median(recent):.3f}"
        raise unhealthy(problem, step, stage, f"resume with spike_factor=None to let it pass, or {LOWER_RATE}")


def unhealthy(problem: str, step: int, stage: Stage, remedy: str) -> RunError:
    """The error that names the batch behind a step that no healthy run has."""
    return RunError(
        f"{problem} at step {step}, before the weights changed. The batch is number {step} of seed {stage.loader.seed} "
        f"(`loader.batch({step})` gives it again); look at it, then {remedy}."
    )


def observe(stage: Stage, model: GLM5, file: Path) -> dict[str, float]:
    """Evaluates and samples; the samples go to `file`."""
    model.eval()
    with torch.no_grad():
        values = stage.evaluate(model) if stage.evaluate else {}
        if stage.sample:
            with replacing(file) as beside:
                beside.write(stage.sample(model).encode())
    model.train()
    return values


def trained(model: GLM5) -> list[torch.nn.Parameter]:
    """Parameters that have a gradient."""
    return [parameter for parameter in model.parameters() if parameter.grad is not None]


def router_biases(model: GLM5) -> dict[int, torch.Tensor]:
    """The correction bias of every sparse layer by its number; MTP modules count on after the trunk."""
    layers = [*model.model.layers, *model.mtp]
    gates = {i: getattr(layer.mlp, "gate", None) for i, layer in enumerate(layers)}
    return {i: gate.e_score_correction_bias for i, gate in gates.items() if gate is not None}


def expert_loads(records: tuple[RouterRecord, ...]) -> dict[int, torch.Tensor]:
    """Tokens per expert [E] of every sparse layer; a layer that ran several times (MTP) is counted each time."""
    loads: dict[int, torch.Tensor] = {}
    for record in records:
        loads[record.layer] = loads.get(record.layer, 0) + record.load_E
    return loads


def busiest_expert(records: tuple[RouterRecord, ...]) -> dict[str, float]:
    """The largest share of any expert, as a multiple of an even share (1.0 is perfect balance)."""
    shares = [(load_E.max() / load_E.mean()).item() for load_E in expert_loads(records).values()]
    return {"busiest_expert": max(shares)} if shares else {}


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C (or a termination signal) came; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def note(number: int, frame: object) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bar(
    name: str, first: int, steps: int, console: Console | None
) -> Iterator[Callable[[int, str, float], None]]:
    """A bar with a text, speed and time left; gives the function that moves it to (step, text, tokens per second)."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[state]}"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with bar:
        task: TaskID = bar.add_task(name, total=steps, completed=first, state="")

        def show(step: int, text: str, speed: float) -> None:
            bar.update(task, completed=step, state=f"{text}  {speed:,.0f} tokens/s")

        yield show
