"""The proof that a killed run is the same run: one goes through, one is killed (SIGKILL) at random moments and resumed.

Both do the whole job in child processes of their own. What they leave is compared: metrics, evaluation, samples and the
model by the hash of their files; weights and optimiser state of the last checkpoint by a hash of their values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import multiprocessing.process
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from glm5.errors import RunError
from glm5.files import sha256_of
from glm5.train.job import perform
from glm5.train.loop import prepare
from glm5.train.run_directory import RunDirectory
from glm5.train.stages import AnyConfig, job_of

POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    target: int
    """Steps that were to be written down before it."""
    seconds_after: float
    """How long after that it came."""
    lines: int
    """Lines in `metrics.jsonl` at that moment."""
    finished: bool
    """The run was faster: the process had ended before."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison found."""

    kills: tuple[Kill, ...]
    whole: dict[str, str]
    """What the uninterrupted run left: name -> SHA-256."""
    killed: dict[str, str]

    @property
    def equal(self) -> bool:
        return self.whole == self.killed

    @property
    def proved(self) -> bool:
        """Equal, and at least one kill met a run that was still going."""
        return self.equal and any(not kill.finished for kill in self.kills)

    @property
    def differences(self) -> tuple[str, ...]:
        return tuple(
            n for n in sorted(self.whole.keys() | self.killed.keys()) if self.whole.get(n) != self.killed.get(n)
        )


def verify_resume(config: AnyConfig, out: Path, *, kills: int = 3, seed: int = 0, threads: int = 1) -> Verdict:
    """Runs `config` under `out/whole` and, killed `kills` times, under `out/killed`; compares what they leave.

    Raises RunError when `out` holds something, or when a child process fails by itself.
    """
    if kills < 1:
        raise RunError(f"kills is {kills}; a proof needs at least one.")
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty; choose another directory for the proof.")
    run_through(config, out / "whole", threads)
    step_seconds = mean_step_seconds(out / "whole")
    done = tuple(run_killed(config, out / "killed", kills, random.Random(seed), threads, step_seconds))
    return Verdict(done, fingerprint(out / "whole", config), fingerprint(out / "killed", config))


def run_through(config: AnyConfig, path: Path, threads: int = 1) -> None:
    """Does (the rest of) the job in a child process."""
    process = _start(config, path, threads)
    process.join()
    _check_end(process, path)


def run_killed(
    config: AnyConfig, path: Path, kills: int, random_: random.Random, threads: int, step_seconds: float
) -> Iterator[Kill]:
    """Kills `kills` times, each time behind a random step and up to a step's time later; then lets the run end.

    A target behind the last step is the end of the run: evaluation, report, the writing of the model. The targets
    ascend; one that the run had passed when it was killed before comes while the next process starts.
    """
    for target in sorted(random_.randint(0, config.loop.steps) for _ in range(kills)):
        after = random_.uniform(0, step_seconds)
        process = _start(config, path, threads)
        begun = time.monotonic()
        while process.is_alive() and (_lines(path) < target or not (path / "run.json").exists()):
            time.sleep(POLL_SECONDS)
            if time.monotonic() - begun > 600:
                process.kill()
                raise RunError(f"{path} made no step {target} within ten minutes; shorten the run.")
        time.sleep(after)
        finished = not process.is_alive()
        lines = _lines(path)
        process.kill()
        process.join()
        if finished:
            _check_end(process, path)
        yield Kill(target, after, lines, finished)
    run_through(config, path, threads)


def _start(config: AnyConfig, path: Path, threads: int) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")  # a process with clean hands that has imported all this once
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_child, args=(config, path, threads), daemon=True)
    process.start()
    return process


def _child(config: AnyConfig, path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    perform(job_of(config), path, resume=(path / "run.json").exists(), console=Console(quiet=True))


def _check_end(process: multiprocessing.process.BaseProcess, path: Path) -> None:
    if process.exitcode != 0:
        raise RunError(f"The run in {path} ended by itself with status {process.exitcode}; its error is above.")


def _lines(path: Path) -> int:
    file = path / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def mean_step_seconds(path: Path) -> float:
    """Of a run that was made."""
    speed = RunDirectory.open(path).read("speed")
    return float(sum(line["seconds"] for line in speed) / max(1, len(speed)))


def fingerprint(path: Path, config: AnyConfig) -> dict[str, str]:
    """name -> SHA-256 of all that a finished run holds and that does not tell the time."""
    run = RunDirectory.open(path)
    names = ["metrics.jsonl", "evaluation.json"]
    names += sorted(f"{folder}/{file.name}" for folder in ("samples", "model") for file in (path / folder).glob("*"))
    found = {name: sha256_of(path / name) for name in names if (path / name).exists()}
    job = job_of(config)
    model = job.make_model()
    optimizers = prepare(job.stage, model, dataclasses.replace(config.loop, checkpoint_activations=False))
    run.load_checkpoint(model, optimizers)
    found["last checkpoint: weights"] = state_sha256(model.state_dict())
    for i, optimizer in enumerate(optimizers):
        found[f"last checkpoint: {type(optimizer).__name__} {i}"] = state_sha256(optimizer.state_dict())
    return found


def state_sha256(state: Any) -> str:
    """Hash of nested dictionaries and lists with tensors at their ends: names, types, shapes and bytes."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                add(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                add(f"{name}.{i}", item)
        else:
            digest.update(f"{name} {value!r}\n".encode())

    add("", state)
    return digest.hexdigest()
