"""Synchronous policy gradients: sample groups, learn once, hand the new weights to the engine, repeat.

Each step samples under exactly the weights that it updates, so no trained token is stale (`staleness` in the
metrics is checked, not assumed). Tasks are functions of (seed, index) and random numbers of (seed, task, attempt,
position); with the indices that the last line of `metrics.jsonl` holds, a checkpoint is weights, optimiser state
and a step number, and a run that was killed and resumed gives the same bits as one that was not.

Left out for now: asynchrony, several updates per batch, repairing groups, distillation, MTP, replayed routing.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from glm5.checkpoint import load_model, save_model
from glm5.engine import Engine
from glm5.envs import Questions
from glm5.errors import RunError
from glm5.files import write_text
from glm5.model import GLM5
from glm5.optim import OptimizerConfig, build_optimizers
from glm5.rl.loss import Normalisation
from glm5.rl.losses import IcePop
from glm5.rl.plain.ledger import Ledger
from glm5.rl.plain.records import Group, Sample
from glm5.rl.plain.rollout import Sampler, Ticket
from glm5.rl.plain.update import Lesson, backward, select
from glm5.rl.report import write_rl_report
from glm5.text import Tokenizer
from glm5.train import RunDirectory, RunInterrupted
from glm5.train.checks import check_choice, check_counts, check_numbers
from glm5.train.guards import LOWER_RATE
from glm5.train.progress import interrupts, progress_bar
from glm5.train.run_directory import directory_sha256, exclusive, model_of


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """One synchronous run. Group size, bounds and normalisation follow GLM-5's reasoning RL, scaled down."""

    parent: Path
    """The run or model directory to start from; its tokenizer is used."""
    steps: int = 20
    seed: int = 0
    prompts_per_step: int = 8
    group_size: int = 8
    max_tokens: int = 16
    thinking: bool = False
    """Whether the prompt opens a thought; a model must have been taught to."""
    loss: IcePop = field(default_factory=IcePop)
    normalisation: Normalisation = "sequence-mean"
    normalise_advantages: bool = True
    """Divide by the group's standard deviation, as reasoning RL does; the agentic objective does not."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(name="adamw", lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0)
    )
    clip_norm: float = 1.0
    attention: Literal["sparse", "dense"] = "sparse"
    """For sampling and learning alike."""
    strict: bool = False
    """Whether the engine is strict: then what is sampled depends on no batch, and so can be compared to the bit."""
    rows: int = 64
    """Samples per forward pass of the trainer."""
    max_attempts: int = 3
    """Times that a task whose environment failed is sampled before it is dropped."""
    checkpoint_every: int = 10
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        check_counts(self, "steps", "prompts_per_step", "max_tokens", "rows", "max_attempts")
        check_counts(self, "checkpoint_every", "keep_checkpoints")
        check_counts(self, "seed", least=0)
        check_counts(self, "group_size", least=2)  # a sample is compared with its siblings
        check_numbers(self, "clip_norm", above=0)
        check_choice(self, "attention", "sparse", "dense")
        check_choice(self, "normalisation", "sequence-mean", "token-mean")


def train_policy(
    config: RLConfig, env: Questions, run_directory: Path, *, resume: bool = False, console: Console | None = None
) -> RunDirectory:
    """Trains the parent's model on `env`; gives the finished run. With `resume`, goes on where it stopped.

    Ctrl-C finishes the step, saves and raises `RunInterrupted`. The indexer and the MTP modules are frozen. Raises
    RunError when another process trains there.
    """
    parent = model_of(config.parent)
    with exclusive(run_directory):
        run = RunDirectory.start(
            run_directory, stage="rl", config=config, inputs={"environment": env.name},
            parent=directory_sha256(parent), resume=resume,
        )  # fmt: skip
        if not run.finished:
            _train(config, env, run, parent, console)
    return run


def _train(config: RLConfig, env: Questions, run: RunDirectory, parent: Path, console: Console | None) -> None:
    """All that is left to do."""
    tokenizer = Tokenizer.from_pretrained(parent)
    model = load_model(parent, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name and not name.startswith("mtp."))
    optimizers = build_optimizers(model, model.config, config.optimizer)
    first = run.load_checkpoint(model, optimizers)
    run.rewind(first)
    queue = TaskQueue.after(run.read("metrics"))
    engine = Engine(copy.deepcopy(model), tokenizer, attention=config.attention, strict=config.strict, version=first)
    sampler = Sampler(
        engine,
        env,
        seed=config.seed,
        group_size=config.group_size,
        max_tokens=config.max_tokens,
        thinking=config.thinking,
    )

    with progress_bar("rl", first, config.steps, console) as show, interrupts() as stopped:
        for step in range(first, config.steps):
            started = time.perf_counter()
            groups = sampler.sample(queue.take(config.prompts_per_step))
            sampled = time.perf_counter()
            samples = [sample for group in groups for sample in group.samples]
            ledger = Ledger(samples)
            lessons, again = select(
                groups, ledger, normalise=config.normalise_advantages, max_attempts=config.max_attempts
            )
            queue.put_back(again)
            learning = _learn(model, optimizers, lessons, config, engine.version)
            for lesson in lessons:
                ledger.trained(lesson.sample)
            engine.update_weights(step + 1, model.state_dict())

            rewarded = rollout_metrics(groups)
            run.append("metrics", {"step": step, **rewarded, **learning, **ledger.metrics(), **queue.state()})
            _write_samples(run.path / "samples" / f"step-{step:08d}.jsonl", samples, ledger)
            seconds = time.perf_counter() - started
            speed = sum(len(sample.completion.token_ids) for sample in samples) / seconds
            times = {"seconds": round(seconds, 4), "sampling_seconds": round(sampled - started, 4)}
            run.append("speed", {"step": step, **times, "tokens_per_second": round(speed)})
            show(step + 1, f"reward {rewarded['reward']:.3f}", speed)
            last, stop = step + 1 == config.steps, stopped()
            if last or stop or (step + 1) % config.checkpoint_every == 0:
                run.save_checkpoint(step + 1, model, optimizers, keep=config.keep_checkpoints)
            if stop and not last:
                raise RunInterrupted(
                    f"Stopped after step {step + 1} of {config.steps} of rl; all is saved in {run.path}."
                )
    write_rl_report(run.path)
    save_model(model.eval(), run.model_directory, tokenizer)


def _learn(
    model: GLM5, optimizers: list[torch.optim.Optimizer], lessons: list[Lesson], config: RLConfig, version: int
) -> dict[str, float]:
    """One update from samples of exactly this weight version; gives loss, diagnostics and gradient norm."""
    if not lessons:
        return {}
    staleness = max(lesson.sample.staleness(version) for lesson in lessons)
    if staleness > 0:
        raise RuntimeError(f"a synchronous step holds a sample that is {staleness} versions old")
    values = backward(
        model, lessons, config.loss, normalisation=config.normalisation, attention=config.attention, rows=config.rows
    )
    values["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm).item()
    if not math.isfinite(values["grad_norm"]):
        raise RunError(
            f"The gradient norm is {values['grad_norm']} at weight version {version}, before the weights changed; "
            f"look at the samples of the last step, then {LOWER_RATE}."
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return values


class TaskQueue:
    """Which task comes next: those that go back to the queue first, then new ones in order."""

    def __init__(self, next_task: int = 0, pending: Sequence[Ticket] = ()) -> None:
        self.next_task = next_task
        self.pending = list(pending)

    @classmethod
    def after(cls, metrics: list[dict[str, Any]]) -> TaskQueue:
        """The queue as the last step of a run left it."""
        if not metrics:
            return cls()
        return cls(metrics[-1]["next_task"], [Ticket(*pair) for pair in metrics[-1]["pending"]])

    def take(self, count: int) -> list[Ticket]:
        """The next `count` tasks."""
        taken, self.pending = self.pending[:count], self.pending[count:]
        fresh = count - len(taken)
        taken += [Ticket(self.next_task + i) for i in range(fresh)]
        self.next_task += fresh
        return taken

    def put_back(self, tickets: Sequence[Ticket]) -> None:
        """Tasks to sample again."""
        self.pending += tickets

    def state(self) -> dict[str, Any]:
        """What `after` reads."""
        return {"next_task": self.next_task, "pending": [[t.task_index, t.attempt] for t in self.pending]}


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all samples that have a reward, whether they are learnt from or not."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = [sample.reward.value for sample in samples if sample.reward is not None]
    lengths = [len(sample.completion.token_ids) for sample in samples]
    logprobs = [x for sample in samples for x in sample.completion.logprobs]
    return {
        "reward": sum(rewards) / len(rewards) if rewards else 0.0,
        "scored": len(rewards),
        "truncated": sum(sample.outcome == "truncated" for sample in samples) / len(samples),
        "tokens": sum(lengths),
        "surprise": -sum(logprobs) / len(logprobs),  # an estimate of the entropy, in nats per token
    }


def _write_samples(path: Path, samples: Sequence[Sample], ledger: Ledger) -> None:
    """Every sample of a step with its fate, one JSON object a line."""
    write_text(path, "".join(json.dumps(s.record(ledger.fate(s)), ensure_ascii=False) + "\n" for s in samples))
