"""Training checkpoints through `torch.distributed.checkpoint`: written beside, hashed, renamed, by any number of ranks.

A checkpoint is a directory `step-00000042`: the weights, buffers and optimiser states under their names in the model
(`model.lm_head.weight`, `optimizer.lm_head.weight.exp_avg`), so that it can be loaded under another parallel plan, one
file per process; the state of the random generators, should anything ever draw from them; and a manifest with the step,
the metrics of that step and a SHA-256 of every file, which is written last. Saving copies the state and writes it in a
thread while training goes on; the next save, or `wait`, reports how it went. A process killed on the way leaves a
hidden `.partial` directory, which the next save removes.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from glm5.errors import CheckpointError
from glm5.files import put_directory, sha256_of, write_json
from glm5.parallel.mesh import world_rank, world_size

KIND = "training state"
# Said at every save and load of a run of one process, from a thread: a filter in place would not be safe there.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class DamagedCheckpoint(CheckpointError):
    """A training checkpoint whose files are not those that were written."""


class TrainingCheckpoints:
    """The checkpoints under one directory. All ranks call its methods together."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pending: tuple[int, Future[Any]] | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what stopped the loop stays in front

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.directory.glob("step-*") if (path / "manifest.json").exists())

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        metrics: dict[str, float] | None = None,
        keep: int = 2,
        keep_best: str | None = None,
        wait: bool = True,
    ) -> None:
        """Saves the state before `step` is computed; then removes all but the newest `keep`, and the best.

        metrics: values of the last step, for the manifest. keep_best: the metric of which the checkpoint with the
        lowest value stays. wait: return when the checkpoint is on the disk; without, once its state is copied.
        Raises CheckpointError when this save, or an earlier one that nobody waited for, failed.
        """
        self.wait()
        self.directory.mkdir(parents=True, exist_ok=True)
        notes = {"step": step, "ranks": world_size(), "metrics": metrics or {}}
        writer = _Writer(self, step, notes, _random_state(), keep, keep_best)
        if world_size() > 1 and self._group is None:  # its thread must not meet the collectives of the training
            self._group = dist.new_group(backend="gloo")
        single = world_size() == 1
        tensors = dict(state_tensors(model, optimizers))
        try:
            saving = dcp.async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=single)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise self._failed(step, error) from error
        self._pending = (step, cast("Future[Any]", saving))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on the disk. Raises CheckpointError when it failed."""
        if self._pending is None:
            return
        step, saving = self._pending
        self._pending = None
        try:
            saving.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise self._failed(step, error) from error

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        whole = self.all()
        newest = f"the newest whole one is {whole[-1].name}" if whole else "there is no earlier one"
        return CheckpointError(
            f"Saving the checkpoint of step {step} under {self.directory} failed ({cause}); {newest}. "
            "Free some space or mend the disk, then resume the run."
        )

    def discard(self, keep: int, keep_best: str | None) -> None:
        """Removes all checkpoints but the newest `keep` and the best; on one rank."""
        found = self.all()
        kept = set(found[-keep:])
        if keep_best is not None:
            values = {path: read_notes(path)["metrics"].get(keep_best) for path in found}
            known = {path: value for path, value in values.items() if value is not None}
            if known:
                kept.add(min(known, key=lambda path: (known[path], path)))
        for path in found:
            if path not in kept:
                shutil.rmtree(path)


class _Writer(FileSystemWriter):
    """Writes beside the checkpoint's place; the first rank closes it with hashes and a rename."""

    def __init__(
        self, owner: TrainingCheckpoints, step: int, notes: dict[str, Any], random_state: dict[str, Any], keep: int,
        keep_best: str | None,
    ) -> None:  # fmt: skip
        self.place = owner.directory / f"step-{step:08d}"
        self.beside = owner.directory / f".{self.place.name}.partial"
        super().__init__(self.beside)
        self.owner, self.notes, self.random_state, self.kept = owner, notes, random_state, (keep, keep_best)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Removes what killed processes left; nobody writes before the plans are exchanged."""
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            for left in self.beside.parent.glob(".step-*.partial"):
                shutil.rmtree(left)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Also notes the hash of what this rank wrote, beside it."""
        written = super().write_data(plan, planner)
        for name in sorted({result.storage_data.relative_path for result in written.value()}):
            note = {"size": (self.beside / name).stat().st_size, "sha256": sha256_of(self.beside / name)}
            write_json(self.beside / f"{name}.json", note)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written."""
        super().finish(metadata, results)
        write_json(self.beside / "random.json", self.random_state)
        files = {}
        for note in sorted(self.beside.glob("*.distcp.json")):
            files[note.name.removesuffix(".json")] = json.loads(note.read_text())
            note.unlink()
        for name in (".metadata", "random.json"):
            files[name] = {"size": (self.beside / name).stat().st_size, "sha256": sha256_of(self.beside / name)}
        write_json(self.beside / "manifest.json", {"kind": KIND, **self.notes, "files": files})
        put_directory(self.beside, self.place)
        self.owner.discard(*self.kept)


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that a checkpoint holds."""
    for name, tensor in model.state_dict().items():
        yield f"model.{name}", tensor
    for name, parameter, optimizer in _owned(model, optimizers):
        for key, tensor in optimizer.state.get(parameter, {}).items():
            yield f"optimizer.{name}.{key}", tensor


def load_training_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Loads a checkpoint of any parallel plan into a model and optimisers under any other; gives its step.

    Raises CheckpointError for a checkpoint that is damaged, or that belongs to another model or optimiser.
    """
    notes = check_training_state(path)
    reader = FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter, optimizer in _owned(model, optimizers):
        prefix = f"optimizer.{name}."
        state: dict[str, Tensor] = {}
        keys = (key.removeprefix(prefix) for key in saved if key.startswith(prefix))
        for key in (key for key in keys if "." not in key):
            entry = saved[prefix + key]
            assert isinstance(entry, TensorStorageMetadata)
            scalar = len(entry.size) == 0
            state[key] = torch.zeros((), dtype=entry.properties.dtype) if scalar else torch.zeros_like(parameter)
            tensors[prefix + key] = state[key]
        if state:
            optimizer.state[parameter] = state
        else:
            optimizer.state.pop(parameter, None)
    strange = sorted(saved.keys() ^ _names_everywhere(tensors.keys()))
    if strange:
        where = "in the checkpoint only" if strange[0] in saved else "not in the checkpoint"
        raise CheckpointError(
            f"{path} does not fit: {strange[0]} is {where}; use the model and the optimiser that the run began with."
        )
    dcp.load(tensors, storage_reader=reader, no_dist=world_size() == 1)
    _set_random_state(json.loads((path / "random.json").read_text()))
    return int(notes["step"])


def _names_everywhere(names: Iterable[str]) -> set[str]:
    """The names on all processes: pipeline stages hold different layers."""
    every = [list(names)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(every, every[0])
    return {name for part in every for name in part}


def read_training_state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole and on the CPU; by one process, without a model."""
    check_training_state(path)
    reader = FileSystemReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def check_training_state(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after its files were compared with it, each by one of the ranks.

    Raises DamagedCheckpoint, on all ranks, for a checkpoint that is not whole.
    """
    problem = None
    notes: dict[str, Any] = {}
    try:
        notes = read_notes(path)
        for name, noted in list(notes["files"].items())[world_rank() :: world_size()]:
            file = path / name
            if not file.is_file() or file.stat().st_size != noted["size"] or sha256_of(file) != noted["sha256"]:
                problem = f"{file} is damaged or missing"
                break
    except (OSError, ValueError, KeyError):
        problem = f"{path / 'manifest.json'} cannot be read"
    problems = [problem]
    if world_size() > 1:
        problems = [None] * world_size()
        dist.all_gather_object(problems, problem)
    problem = next((text for text in problems if text is not None), None)
    if problem is not None:
        raise DamagedCheckpoint(f"{problem}; remove {path.name} to resume from an earlier checkpoint.")
    return notes


def read_notes(path: Path) -> dict[str, Any]:
    """The manifest, unchecked."""
    notes = json.loads((path / "manifest.json").read_text())
    if not isinstance(notes, dict) or notes.get("kind") != KIND:
        raise ValueError(f"{path} is not a {KIND}")
    return notes


def _owned(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    """Name, parameter and its optimiser, in the order of the model."""
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in owners:
            yield name, parameter, owners[id(parameter)]


def _random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy and PyTorch as JSON values."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    torch_state = torch.get_rng_state().numpy().tobytes().hex()
    return {"python": [version, list(numbers), gauss], "numpy": [kind, keys.tolist(), *rest], "torch": torch_state}


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
