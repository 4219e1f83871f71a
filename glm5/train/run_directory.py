"""A run directory: everything that one stage was made from and has produced.

`run.json` (a random name, configuration, hashes of data and parent, code and environment of each session),
`metrics.jsonl` (one line a step; only values that follow from configuration and step, so that a repeated run gives the
same bytes), `speed.jsonl` (wall-clock measurements), `checkpoints/` (the newest few, each whole or absent), `samples/`,
`report.html`, and last of all `model/`, a Hugging Face directory. The presence of `model/` says that the run is
finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glm5.checkpoint.training_state import DamagedCheckpoint, TrainingCheckpoints, load_training_state
from glm5.errors import RunError
from glm5.files import Lock, locked, replacing, sha256_of, write_json
from glm5.parallel.mesh import on_first, world_rank
from glm5.train.recorded import (
    OPERATIONAL,
    RunChanged,
    first_difference,
    operational,
    plain,
    with_defaults,
    without_paths,
)


class RunDirectory:
    """Create one with `start`, find one with `open`. Of many processes the first writes, the others agree with it."""

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self.path = path
        self.description = description
        self.saved = TrainingCheckpoints(path / "checkpoints")

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """A run that was started before."""
        try:
            return cls(path, json.loads((path / "run.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RunError(f"{path} has no run.json, so it is no run directory; check the path.") from None
        except ValueError:
            raise RunError(f"{path / 'run.json'} is not JSON; the run cannot be read.") from None

    @classmethod
    def start(
        cls,
        path: Path,
        *,
        stage: str,
        config: Any,
        inputs: dict[str, str],
        parent: str | None = None,
        resume: bool = False,
        may_change: frozenset[str] = frozenset(),
        over: bool = False,
    ) -> RunDirectory:
        """A new run, or the same one again when `resume`.

        config: the stage's dataclass. inputs: name -> SHA-256 of what the run reads. parent: SHA-256 of the model
        that it starts from. Raises RunError when the directory is taken, or when a resumed run was started
        differently; `OPERATIONAL` settings and those of `may_change` may differ, each session notes its own, but
        not where the run is `over` and learns no more: what it holds stays what it was made with. Whoever
        trains calls this inside `exclusive(path)`: the settings of a run that another process trains stay as they are.
        """
        on_first(lambda: cls._note(path, stage, config, inputs, parent, resume, OPERATIONAL | may_change, over))
        return cls.open(path)

    @classmethod
    def _note(
        cls,
        path: Path,
        stage: str,
        config: Any,
        inputs: dict[str, str],
        parent: str | None,
        resume: bool,
        free: frozenset[str],
        over: bool,
    ) -> None:
        """Writes `run.json`, or adds a session to it unless the run is over."""
        plan = {"stage": stage, "config": plain(config), "inputs": inputs, "parent": parent}
        session = {
            "version": importlib.metadata.version("glm5"),
            "code_sha256": code_sha256(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "settings": operational(plan, free),
        }
        sessions, name = [], uuid.uuid4().hex
        if (path / "run.json").exists():
            old = cls.open(path)
            if not resume:
                raise RunError(f"{path} already holds a run; resume it, or choose another directory.")
            before = {name: old.description.get(name) for name in plan}
            before["config"] = with_defaults(before["config"], config)
            change = first_difference(without_paths(before), without_paths(plan), free=free)
            if change is not None:
                raise RunChanged(path, change)
            if over:
                return
            sessions, name = old.description["sessions"], old.description.get("id", name)
        make_directory(path / "checkpoints", path)
        if not sessions or sessions[-1] != session:
            sessions = [*sessions, session]
        write_json(path / "run.json", {"kind": "run", "id": name, **plan, "sessions": sessions})

    @property
    def id(self) -> str:
        """The run's name wherever its directory is moved."""
        return str(self.description["id"])

    # ---- metrics ------------------------------------------------------------------------------------------------
    def append(self, file: str, values: dict[str, Any]) -> None:
        """Adds a line to `metrics` or `speed`."""
        if world_rank() > 0:
            return
        with open(self.path / f"{file}.jsonl", "a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")

    def read(self, file: str) -> list[dict[str, Any]]:
        """All whole lines of `metrics` or `speed`; a last line that a kill cut short is left out."""
        path = self.path / f"{file}.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def rewind(self, step: int) -> None:
        """Forgets the lines of `step` and later: they will be computed again. Raises RunError if earlier ones lack."""
        on_first(lambda: self._rewind(step))

    def _rewind(self, step: int) -> None:
        if [values["step"] for values in self.read("metrics") if values["step"] < step] != list(range(step)):
            raise RunError(
                f"{self.path / 'metrics.jsonl'} lacks lines of the {step} steps before the newest checkpoint; restore "
                "it, remove the checkpoints that are later than its last line, or start a new run."
            )
        for name in ("metrics", "speed"):
            kept = [values for values in self.read(name) if values["step"] < step]
            with replacing(self.path / f"{name}.jsonl") as file:
                file.write("".join(json.dumps(values) + "\n" for values in kept).encode())

    # ---- checkpoints --------------------------------------------------------------------------------------------
    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return self.saved.all()

    def save_checkpoint(
        self,
        step: int,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        keep: int = 2,
        keep_best: str | None = None,
        metrics: dict[str, float] | None = None,
        wait: bool = True,
    ) -> None:
        """Saves the state before `step` is computed, then removes all but the newest `keep` and the best.

        Arguments: see `TrainingCheckpoints.save`.
        """
        for name in ("metrics", "speed") if world_rank() == 0 else ():  # a checkpoint must not be ahead of its lines
            with open(self.path / f"{name}.jsonl", "ab") as lines:
                os.fsync(lines.fileno())
        self.saved.save(step, model, optimizers, metrics=metrics, keep=keep, keep_best=keep_best, wait=wait)

    def load_checkpoint(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], *, at_most: int | None = None
    ) -> int:
        """Loads the newest checkpoint (of a step of at most `at_most`), checked against its hash.

        Gives the step to go on with, 0 when there is no checkpoint.
        """
        found = [path for path in self.checkpoints() if at_most is None or step_of(path) <= at_most]
        if not found:
            return 0
        *older, newest = found
        try:
            return load_training_state(newest, model, optimizers)
        except DamagedCheckpoint as error:
            earlier = older[-1].name if older else "the beginning"
            raise RunError(f"{newest} is damaged; remove that directory to resume from {earlier}.") from error

    # ---- the result ---------------------------------------------------------------------------------------------
    @property
    def model_directory(self) -> Path:
        """The Hugging Face directory that a finished run has."""
        return self.path / "model"

    @property
    def finished(self) -> bool:
        return (self.model_directory / "config.json").exists()

    def reopen(self) -> None:
        """Puts the model of a finished run aside, as `model-N` after the steps it has learnt from: the run goes on.

        Where it was finished and reopened at that step before, as `model-N-2`, `model-N-3` and so on.
        """
        name = f"model-{len(self.read('metrics'))}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        self.model_directory.rename(next(self.path / name for name in names if not (self.path / name).exists()))


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keeps other processes out of a run directory, new or not, while this one trains; a killed one lets go.

    Raises RunError when another one is in, on all processes of this run.
    """
    lock = on_first(lambda: _locked(path))
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _locked(path: Path) -> Lock:
    make_directory(path, path)
    try:
        return locked(path / ".lock", f"{path} is being trained by another process; wait for it, or stop it.")
    except OSError as error:
        raise _unusable(path, error) from None


def make_directory(path: Path, run: Path) -> None:
    """Makes a place of the directory `run`, where it is not there. Raises RunError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(run, error) from None


def _unusable(run: Path, error: OSError) -> RunError:
    return RunError(f"{run} cannot be made a run directory ({error.strerror}); choose another one.")


def step_of(checkpoint: Path) -> int:
    """The step before which a checkpoint was saved, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def model_of(path: Path) -> Path:
    """The model directory of a run, or `path` itself when it is one."""
    if (path / "run.json").exists():
        run = RunDirectory.open(path)
        if not run.finished:
            raise RunError(f"{path} has no finished model yet; resume that run first.")
        return run.model_directory
    if not (path / "config.json").exists():
        raise RunError(f"{path} is neither a run nor a model directory; check the path.")
    return path


def directory_sha256(path: Path) -> str:
    """One hash over the names and contents of the files of a directory, several of which are read at once."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.is_file())
    with ThreadPoolExecutor() as readers:  # hashlib lets go of the interpreter
        for file, found in zip(files, readers.map(sha256_of, files), strict=True):
            digest.update(f"{file.name} {found}\n".encode())
    return digest.hexdigest()


def code_sha256() -> str:
    """Hash of the package's Python source: the exact version of the code, with or without a repository."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
