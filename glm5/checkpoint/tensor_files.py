"""Reading the safetensors files of a model directory: which tensors there are, and one tensor at a time.

A directory holds either `model.safetensors`, or shards and `model.safetensors.index.json`, whose `weight_map` names the
shard of every tensor. Tensors are memory-mapped, and one file is open at a time, so that reading a whole checkpoint in
file order never keeps more than one shard resident.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm5.errors import CheckpointError, did_you_mean

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
PACKED_DTYPES = {"U8": torch.uint8}
"""Two INT4 values a byte."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    file: str
    dtype: str
    """safetensors' name of the dtype, e.g. "BF16"."""
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a directory by name. `info` is filled from the headers; no weight is read before `read`.

    Raises `CheckpointError` for a directory without weights, an unreadable index, a missing or damaged shard, and an
    index that does not say what the shards hold.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.info: dict[str, TensorInfo] = {}
        self._open_file: str | None = None
        self._handle: Any = None
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; give the directory that holds config.json.")
        weight_map = self._read_index()
        for file in [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values())):
            self._read_header(file)
        if weight_map is not None:
            self._compare_with_index(weight_map)

    def read(self, name: str, part: tuple[int | slice, ...] = ()) -> Tensor:
        """The tensor as it is stored, or a part of it: a memory-mapped view, valid as long as it is referenced.

        The library reads a whole tensor ahead from the disk but not a part, so one expert of a stack costs one expert.
        """
        file = self.info[name].file
        if self._open_file != file:
            self.close()
            self._handle = self._open(file).__enter__()
            self._open_file = file
        return self._handle.get_slice(name)[part] if part else self._handle.get_tensor(name)

    def names_by_file(self) -> list[str]:
        """All names, file after file: the order in which reading opens every file once."""
        return sorted(self.info, key=lambda name: self.info[name].file)

    def close(self) -> None:
        """Closes the open file; its pages are given back once no tensor of it is referenced."""
        if self._handle is not None:
            self._handle.__exit__(None, None, None)
        self._handle, self._open_file = None, None

    # ---- headers and index ----------------------------------------------------------------------------------------
    def _read_index(self) -> dict[str, str] | None:
        """The index's `weight_map`, or None where a single file holds everything."""
        path = self.directory / INDEX_FILE
        single = (self.directory / SINGLE_FILE).is_file()
        if not path.is_file():
            if not single:
                raise CheckpointError(
                    f"{self.directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; it has no weights to load."
                )
            return None
        if single:
            raise CheckpointError(
                f"{self.directory} holds both {SINGLE_FILE} and {INDEX_FILE}; one is stale: remove it."
            )
        try:
            weight_map = json.loads(path.read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a weight index ({type(error).__name__}: {error}); download or write it again."
            ) from None
        if not isinstance(weight_map, dict) or not weight_map or not all(_is_file_name(f) for f in weight_map.values()):
            raise CheckpointError(f"weight_map in {path} must name one file of this directory for every tensor.")
        return weight_map

    def _open(self, file: str) -> Any:
        path = self.directory / file
        if not path.is_file():
            present = [p.name for p in self.directory.glob("*.safetensors")]
            raise CheckpointError(
                f"Shard {file} is missing from {self.directory}; copy or download it again."
                f"{did_you_mean(file, present)}"
            )
        try:
            return safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size:,} bytes) is damaged or cut short ({error}); copy or download it again."
            ) from None

    def _read_header(self, file: str) -> None:
        with self._open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                if name in self.info:
                    raise CheckpointError(
                        f"{name} is in both {self.info[name].file} and {file} of {self.directory}; "
                        "shards of two models are mixed: remove the stale ones."
                    )
                view = handle.get_slice(name)
                self.info[name] = TensorInfo(file, view.get_dtype(), tuple(view.get_shape()))

    def _compare_with_index(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.info:
                raise CheckpointError(
                    f"{INDEX_FILE} of {self.directory} says that {file} holds {name}, but no shard does; index and "
                    f"shards are of different models: fetch both again.{did_you_mean(name, self._beside(name))}"
                )
            if self.info[name].file != file:
                raise CheckpointError(
                    f"{INDEX_FILE} of {self.directory} says that {file} holds {name}, but {self.info[name].file} does; "
                    "fetch the index again."
                )
        for name, info in self.info.items():
            if name not in weight_map:
                raise CheckpointError(
                    f"{info.file} in {self.directory} holds {name}, which {INDEX_FILE} does not list; "
                    "index and shards are of different models: fetch both again."
                )

    def _beside(self, name: str) -> list[str]:
        """Names in the same module tree, few enough to compare letter by letter."""
        stem = ".".join(name.split(".")[:3])
        return [n for n in self.info if n.startswith(stem)][:2000]


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and Path(value).name == value
