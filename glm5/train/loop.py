"""THE training loop. A stage is data, a loss, what learns, and a schedule; everything else is here, once.

Exact by construction: a batch is a function of the step, the learning rate is a function of the step, nothing draws
random numbers from a hidden state. A checkpoint is therefore weights, optimiser state and a step number, and a run that
was killed and resumed gives the same bits as one that was not.

On many processes (`LoopConfig.parallel`) each computes its rows of the batch; what a mean divides by, losses, loads of
the experts and gradients are added over all of them, so that they take the step of one process. Only the first writes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
import tyro
from rich.console import Console

from glm5.data import Batch
from glm5.errors import ConfigError, RunError
from glm5.files import write_text
from glm5.model import GLM5
from glm5.optim import OptimizerConfig, Schedule, build_optimizers, clip_gradients, rate_at, set_rate
from glm5.optim.router_balance import update_router_bias
from glm5.parallel import ParallelPlan
from glm5.parallel.apply import parallelize
from glm5.parallel.context import whole_rows
from glm5.parallel.mesh import Mesh, on_first, open_mesh
from glm5.parallel.pipeline import PipelinePart, copies
from glm5.train.activations import checkpoint_layers
from glm5.train.checks import check_choice, check_counts, check_numbers
from glm5.train.experts import Loads, busiest_expert, expert_loads, router_biases
from glm5.train.guards import SPIKE_WINDOW, recent_losses, skipped_in_a_row, trouble_with, unhealthy
from glm5.train.losses import Counts, Loss, count
from glm5.train.progress import RunInterrupted, interrupts, progress_bar
from glm5.train.run_directory import RunDirectory
from glm5.train.watch import Watcher, watchers

LOAD_LINES = 50
"""How often in a run the load of every expert is noted; the busiest one is in every line."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every stage sets: length, optimiser, schedule, and how often things are written."""

    steps: int
    """Batches to learn from."""
    seed: int = 0
    """Of the order of the data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    indexer_optimizer: OptimizerConfig | None = None
    """For the indexers, where they learn beside the model; None: the same as the rest."""
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float = 1.0
    """Of the gradient; that of indexers is clipped apart."""
    router_bias_rate: float = 1e-3
    """Step of the router's correction bias; 0 leaves it alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast over fp32 weights. A little faster on a CPU, at `nano` size too."""
    micro_rows: int | None = None
    """Rows of a forward pass; the gradients of a step add up over them. None: all rows at once."""
    logits_mib: int = 256
    """MiB of logits that are held at once; a pass with more makes them piece by piece, and again going backward."""
    checkpoint_activations: bool = False
    """Layers keep only their input and run again in the backward pass: less memory, the same bits."""
    parallel: Annotated[ParallelPlan, tyro.conf.Suppress] = field(default_factory=ParallelPlan)
    """How many processes share the work, and how; a resumed run may have another plan."""
    gather: Literal["fp32", "bf16"] = "fp32"
    """The dtype in which FSDP gathers weights and layers compute; `bf16` halves its traffic."""
    spike_factor: float | None = 3.0
    """A loss of this many times the median of the last 20 steps is a spike; None lets it pass."""
    on_spike: Literal["stop", "skip"] = "stop"
    """At a spike, or at a loss or gradient that is not finite: stop with the batch's number, or leave the step out."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """The newest so many; older ones are removed."""
    keep_best: str | None = None
    """A metric (such as heldout_bits_per_byte): the checkpoint with its lowest value stays too."""
    save_in_background: bool = True
    """Checkpoints are written while the next steps run."""
    evaluate_every: int = 0
    """Steps between evaluations and samples; 0: only after the last step."""
    watch: tuple[Watcher, ...] = ()
    """Who else gets the metrics."""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "logits_mib", "checkpoint_every", "keep_checkpoints")
        check_counts(self, "seed", "evaluate_every", least=0)
        check_numbers(self, "clip_norm", above=0)
        check_numbers(self, "router_bias_rate")
        if self.micro_rows is not None:
            check_counts(self, "micro_rows")
        if self.spike_factor is not None:
            check_numbers(self, "spike_factor", above=1)
        check_choice(self, "precision", "fp32", "bf16")
        check_choice(self, "gather", "fp32", "bf16")
        check_choice(self, "on_spike", "stop", "skip")
        if self.keep_best is not None:
            check_choice(self, "keep_best", "loss", "lm", "mtp", "balance", "indexer_kl", "heldout_bits_per_byte")
            every = self.evaluate_every
            if self.keep_best == "heldout_bits_per_byte" and not (every and self.checkpoint_every % every == 0):
                raise ConfigError(
                    f"keep_best={self.keep_best} needs an evaluation at every checkpoint; set evaluate_every to a "
                    f"divisor of checkpoint_every ({self.checkpoint_every})."
                )
        for name in self.watch:
            check_choice(self, "watch", "tensorboard", "trackio", value=name)


class BatchSource(Protocol):
    """Any loader: a batch is a function of the step."""

    @property
    def seed(self) -> int: ...

    def batch(self, step: int) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What makes one stage different from another."""

    name: str
    loader: BatchSource
    loss: Callable[[GLM5, Batch, Counts], Loss]
    """The loss of a micro-batch, divided by the counts of the whole step."""
    learns: Callable[[str], bool] = lambda name: True
    """Whether the parameter of that name is trained; the others are frozen."""
    evaluate: Callable[[GLM5], dict[str, float]] | None = None
    """Values that join the metrics of the step."""
    sample: Callable[[GLM5], str] | None = None
    """Text for `samples/`."""


@dataclass(frozen=True)
class Computed:
    """What a step found out before the weights move; the (clipped) gradients are in the model."""

    loss: float
    parts: dict[str, float]
    tokens: int
    grad_norms: dict[str, float]
    """`grad_norm` of the model, `indexer_grad_norm` of the indexers, before clipping."""
    loads: Loads


def train(stage: Stage, model: GLM5, run: RunDirectory, config: LoopConfig, *, console: Console | None = None) -> None:
    """Trains `model` in place from the run's newest checkpoint (or from what it holds) to the last step.

    Whoever began the run keeps other processes out of it (`exclusive`), from before its `run.json` is written.

    Ctrl-C finishes the step, saves and raises RunInterrupted. A loss that is not finite, or a spike, raises RunError
    before the weights take the step, or is left out if the configuration says so.
    """
    mesh = open_mesh(config.parallel)
    optimizers = prepare(stage, model, config, mesh)
    first = run.load_checkpoint(model, optimizers)
    run.rewind(first)
    recent = recent_losses(run.read("metrics"))
    skipped = skipped_in_a_row(run.read("metrics"))
    model.train()
    first_process = mesh.rank == 0
    with (
        progress_bar(stage.name, first, config.steps, console if first_process else Console(quiet=True)) as show,
        interrupts() as stopped,
        watchers(config.watch if first_process else (), run.path, first) as write,
        run.saved,
    ):
        for step in range(first, config.steps):
            started = time.perf_counter()
            fraction = rate_at(config.schedule, step, config.steps)
            set_rate(optimizers, fraction)
            batch = stage.loader.batch(step)
            found = compute(stage, model, batch, config, mesh)
            values = metrics_of(step, found, fraction * config.optimizer.lr)
            trouble = trouble_with(found.loss, found.grad_norms, recent, config.spike_factor)
            if trouble is None:
                skipped = 0
                update(model, optimizers, found.loads, config)
                recent = recent_losses([*({"loss": loss} for loss in recent), values])
            elif config.on_spike == "stop" or skipped == SPIKE_WINDOW:
                raise unhealthy(trouble, stage.name, step, stage.loader.seed, skipped)
            else:
                skipped += 1
                values["skipped"] = trouble
            model.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started

            last = step + 1 == config.steps
            if last or step % max(1, config.steps // LOAD_LINES) == 0:
                values["expert_load"] = {str(layer): load_E.int().tolist() for layer, load_E in found.loads.items()}
            if last or (config.evaluate_every and (step + 1) % config.evaluate_every == 0):
                values |= observe(stage, model, run.path / "samples" / f"step-{step + 1:08d}.txt")
            run.append("metrics", values)
            speed = batch.input_ids_BT.numel() * mesh.size("data") / seconds
            run.append("speed", {"step": step, "seconds": round(seconds, 4), "tokens_per_second": round(speed)})
            write(step, {**values, "tokens_per_second": speed})
            show(step + 1, f"loss {found.loss:.3f}", speed)
            stop = mesh.any(stopped())
            if last or stop or (step + 1) % config.checkpoint_every == 0:
                run.save_checkpoint(
                    step + 1, model, optimizers, metrics=values, keep=config.keep_checkpoints,
                    keep_best=config.keep_best, wait=last or stop or not config.save_in_background,
                )  # fmt: skip
            if stop and not last:
                raise RunInterrupted(
                    f"Stopped after step {step + 1} of {config.steps} of {stage.name}; all is saved in {run.path}."
                )


ONE = Mesh(ParallelPlan())


def prepare(stage: Stage, model: GLM5, config: LoopConfig, mesh: Mesh = ONE) -> list[torch.optim.Optimizer]:
    """Freezes what the stage does not train, cuts the model; gives the optimisers of the rest, of the indexers last."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.learns(name))
    if config.checkpoint_activations:
        checkpoint_layers(model)
    parallelize(model.to(mesh.device), mesh, gather_dtype=torch.bfloat16 if config.gather == "bf16" else None)
    if config.indexer_optimizer is None:
        return build_optimizers(model, model.config, config.optimizer)
    return [
        *build_optimizers(model, model.config, config.optimizer, only=lambda name: ".indexer." not in name),
        *build_optimizers(model, model.config, config.indexer_optimizer, only=lambda name: ".indexer." in name),
    ]


def compute(stage: Stage, model: GLM5, batch: Batch, config: LoopConfig, mesh: Mesh = ONE) -> Computed:
    """Loss and gradients of one step, micro-batch after micro-batch; the gradients are clipped over all of them.

    `batch` holds the rows of this process; what is computed is that of all rows.
    """
    batch = Batch(*(x.to(mesh.device) for x in (batch.input_ids_BT, batch.targets_BT, batch.segment_ids_BT)))
    counts = Counts(mesh.total(count(batch, model.mtp_steps).values, "data"))
    total = torch.zeros((), device=mesh.device)
    parts: dict[str, torch.Tensor] = {}
    loads: Loads = {}

    def micro_loss(model: GLM5, micro: Batch) -> tuple[torch.Tensor, Loss]:
        with torch.autocast(total.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = stage.loss(model, micro, counts)
        return loss.total, dataclasses.replace(loss, total=loss.total.detach())

    for loss in losses(model, list(micro_batches(batch, config.micro_rows)), micro_loss, config):
        total = total + loss.total
        parts = {name: parts.get(name, 0) + value for name, value in loss.parts.items()}
        loads = expert_loads(loss.router, loads)
    norms = clip(model, config.clip_norm)
    whole, *sums = mesh.total(torch.stack([total, *parts.values()]), "tokens").tolist()
    if loads:
        loads = dict(zip(loads, mesh.total(torch.stack(list(loads.values())), "tokens"), strict=True))
    found = Computed(whole, dict(zip(parts, sums, strict=True)), int(counts.tokens), norms, loads)
    return over_stages(found, model) if isinstance(model, PipelinePart) else found


def losses(
    model: GLM5, micro: list[Batch], loss: Callable[[GLM5, Batch], tuple[torch.Tensor, Loss]], config: LoopConfig
) -> Iterator[Loss]:
    """The (detached) loss of every micro-batch, when its backward pass is done."""
    if isinstance(model, PipelinePart):
        shape = (*model.rows.part(micro[0].input_ids_BT).shape, model.config.hidden_size)
        if len(micro[0].input_ids_BT) != len(micro[-1].input_ids_BT):
            raise RunError("pipeline stages want micro-batches of one size; choose a micro_rows that divides the rows.")
        dtype = torch.bfloat16 if config.gather == "bf16" else torch.float32
        yield from model.pipeline.step(model, micro, loss, shape, dtype)
        return
    for batch in micro:
        total, kept = loss(model, batch)
        total.backward()
        yield kept


def over_stages(found: Computed, model: PipelinePart) -> Computed:
    """What all stages of a pipeline found together: a part of the loss may belong to some of them only."""
    group = model.pipeline.group
    stages: list[Computed] = [found] * group.size()
    mine = dataclasses.replace(found, loads={layer: load_E.cpu() for layer, load_E in found.loads.items()})
    torch.distributed.all_gather_object(stages, mine, group=group)
    parts: dict[str, float] = {}
    for stage in reversed(stages):  # the last one has the parts that come first
        for name, value in stage.parts.items():
            parts[name] = parts.get(name, 0.0) + value
    device = next(model.parameters()).device
    loads = {layer: load_E.to(device) for stage in stages for layer, load_E in stage.loads.items()}
    return dataclasses.replace(found, loss=sum(stage.loss for stage in stages), parts=parts, loads=loads)


def clip(model: GLM5, most: float) -> dict[str, float]:
    """Clips the gradients of the model and those of the indexers apart: neither loss may scale the other's step."""
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault("indexer_grad_norm" if ".indexer." in name else "grad_norm", []).append(parameter)
    group = model.pipeline.group if isinstance(model, PipelinePart) else None
    twice = copies(model)
    return {name: clip_gradients(parts[name], most, pipeline=group, copies=twice) for name in sorted(parts)}


def micro_batches(batch: Batch, rows: int | None) -> Iterator[Batch]:
    """The batch in pieces of `rows` rows, the last one may be smaller."""
    for i in range(0, len(batch.input_ids_BT), rows or len(batch.input_ids_BT)):
        part = slice(i, i + (rows or len(batch.input_ids_BT)))
        yield Batch(batch.input_ids_BT[part], batch.targets_BT[part], batch.segment_ids_BT[part])


def update(model: GLM5, optimizers: list[torch.optim.Optimizer], loads: Loads, config: LoopConfig) -> None:
    """Moves the weights, and the router biases towards an even load."""
    for optimizer in optimizers:
        optimizer.step()
    if config.router_bias_rate:
        biases = router_biases(model)
        for layer, bias_E in biases.items():
            if layer in loads:
                update_router_bias(bias_E, loads[layer], config.router_bias_rate)


def metrics_of(step: int, found: Computed, rate: float) -> dict[str, Any]:
    """The line of a step; a number that is not finite becomes null, as JSON has none."""
    values = {"loss": found.loss, **found.parts, **found.grad_norms}
    plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return {"step": step, "tokens": found.tokens, **plain, "rate": rate, **busiest_expert(found.loads)}


def observe(stage: Stage, model: GLM5, file: Path) -> dict[str, float]:
    """Evaluates and samples; the samples go to `file`. A model cut into pipeline stages does neither."""
    if isinstance(model, PipelinePart):
        return {}
    model.eval()
    with torch.no_grad(), whole_rows(model):
        values = stage.evaluate(model) if stage.evaluate else {}
        if stage.sample:
            text = stage.sample(model)  # by all processes: a cut model runs on all of them
            on_first(lambda: write_text(file, text))
    model.train()
    return values
