"""Weights as a directory of versions, for engines that are far away and for other programs.

    weights/v00000122/  manifest.json  weights.safetensors          a whole version
            v00000123/  manifest.json  delta.zst                    what changed since version 122

A version appears whole or not at all (written beside, flushed, renamed). The manifest has the SHA-256 of the file and
of the weights that it leads to, so a damaged file, a delta on a wrong base or bytes under wrong names are refused, and
the reader keeps what it has. Every `whole_every`-th version is whole; old versions are removed when no kept one
needs them. One publisher writes; any number of readers may be at any version.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from glm5.errors import WeightsError
from glm5.files import replacing_directory, write_json
from glm5.rl.weights import delta
from glm5.rl.weights.layout import Layout, Part, check_newer
from glm5.rl.weights.shared import Snapshot

FORMAT = "glm5-weights-1"
MANIFEST, WHOLE, DELTA = "manifest.json", "weights.safetensors", "delta.zst"
PREFIX, MODEL_PREFIX = "v", "model-"
"""Of a version's directory; of that of a whole model, which SGLang reads (`fleet/delivery.py`)."""
TRIES = 3
"""A version that a reader is looking at may be removed when newer ones have come; it then looks again."""


@dataclass(frozen=True)
class Manifest:
    """What a version's directory says of itself."""

    format: str
    version: int
    base: int | None
    """The version that the delta is for; None for a whole one."""
    file_sha256: str
    weights_sha256: str
    """Of the layout and all bytes, after the delta was applied."""
    layout: tuple[Part, ...]


class DirectoryPublisher:
    """The writer. `keep`: how many of the newest versions readers may still ask for."""

    def __init__(self, path: str | Path, *, whole_every: int = 8, keep: int = 3, after: int | None = None) -> None:
        """after: a trainer that was resumed at this version publishes the later ones anew; they are removed."""
        if whole_every < 1 or keep < 1:
            raise WeightsError(f"whole_every is {whole_every} and keep {keep}; both must be at least 1.")
        self.path, self.whole_every, self.keep = Path(path), whole_every, keep
        self.path.mkdir(parents=True, exist_ok=True)
        for version in versions(self.path) if after is not None else ():
            if after is not None and version > after:
                shutil.rmtree(self.path / _name(version))
        self.version: int | None = max(versions(self.path), default=None)
        self._flat: Tensor | None = None
        self._layout: Layout | None = None
        self._deltas = 0

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Makes a version visible. Raises `WeightsError` for what is not newer or does not fit, and when it cannot be
        written; what was there stays."""
        check_newer(version, self.version)
        layout = self._layout or Layout.of(tensors)
        flat = layout.pack(tensors)
        change = None
        if self._flat is not None and self._deltas + 1 < self.whole_every:
            change = delta.encode(flat, self._flat)
            change = change if len(change) < layout.num_bytes else None
        with replacing_directory(self.path / _name(version)) as stage:
            if change is None:
                try:
                    save_file(layout.unpack(flat), stage / WHOLE)
                except SafetensorError as error:  # its name for a full disk
                    raise WeightsError(f"{_name(version)} cannot be written ({error}); make room.") from None
                file_sha256 = _sha256((stage / WHOLE).read_bytes())
            else:
                (stage / DELTA).write_bytes(change)
                file_sha256 = _sha256(change)
            base = None if change is None else self.version
            manifest = Manifest(FORMAT, version, base, file_sha256, _weights_sha256(layout, flat), layout.parts)
            write_json(stage / MANIFEST, asdict(manifest))
        self._deltas = 0 if change is None else self._deltas + 1
        self.version, self._flat, self._layout = version, flat, layout
        self._collect()

    def _collect(self) -> None:
        """Removes what no reader of the kept versions needs."""
        found = versions(self.path)
        needed = set()
        for version in found[-self.keep :]:
            at: int | None = version
            while at is not None and at not in needed:
                needed.add(at)
                try:
                    at = _manifest(self.path, at).base
                except (WeightsError, FileNotFoundError):  # readers refuse what cannot be read; it needs nothing
                    at = None
        for version in set(found) - needed:
            shutil.rmtree(self.path / _name(version))


class DirectorySubscriber:
    """A reader. It holds a copy of the newest weights that it took, for deltas to be added to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.version: int | None = None
        self._flat: Tensor | None = None

    def newest(self) -> Snapshot | None:
        """The newest version, if it is newer than the one given last; None otherwise.

        Raises `WeightsError` for a version that is damaged or whose base is missing; the one given last stays.
        """
        for tried in range(TRIES):
            found = versions(self.path)
            if not found or (self.version is not None and found[-1] <= self.version):
                return None
            try:
                return self._take(found[-1])
            except FileNotFoundError as error:
                if tried == TRIES - 1:
                    missing = Path(error.filename).relative_to(self.path)
                    raise WeightsError(
                        f"Weights of version {found[-1]} need {missing}, which is not there; publish a whole version."
                    ) from None
        raise AssertionError

    def _take(self, version: int) -> Snapshot:
        chain = [_manifest(self.path, version)]
        while (base := chain[-1].base) is not None and base != self.version:
            if base >= chain[-1].version:
                raise WeightsError(f"{_name(version)}: the manifest names a base of {base}; publish a whole version.")
            chain.append(_manifest(self.path, base))
        flat = self._flat
        for manifest in reversed(chain):
            flat = self._read(manifest, flat)
        assert flat is not None
        layout = Layout(chain[0].layout)
        self.version, self._flat = version, flat
        return Snapshot(version, layout.unpack(flat.clone()))

    def _read(self, manifest: Manifest, base: Tensor | None) -> Tensor:
        """The weights of one version, checked."""
        directory, layout = self.path / _name(manifest.version), Layout(manifest.layout)
        data = (directory / (WHOLE if manifest.base is None else DELTA)).read_bytes()
        if _sha256(data) != manifest.file_sha256:
            raise WeightsError(f"{directory.name} is damaged: its SHA-256 is not the manifest's; publish a newer one.")
        try:
            if manifest.base is None:
                tensors = load(data)
                flat = layout.pack({name: tensors[name] for name, _, _ in layout.parts})
            else:
                assert base is not None
                flat = delta.apply(data, base)
        except (KeyError, SafetensorError) as error:
            raise WeightsError(f"{directory.name} is not what its manifest says ({error}); publish it anew.") from None
        if len(flat) != layout.num_bytes or _weights_sha256(layout, flat) != manifest.weights_sha256:
            raise WeightsError(
                f"{directory.name} does not lead to the weights of its manifest; publish a whole version."
            )
        return flat


def versions(path: Path, prefix: str = PREFIX) -> list[int]:
    """The versions that are there, in order."""
    names = [entry.name.removeprefix(prefix) for entry in path.glob(f"{prefix}*")]
    return sorted(int(name) for name in names if re.fullmatch(r"\d{8,}", name))


def _name(version: int) -> str:
    return f"{PREFIX}{version:08d}"


def _manifest(path: Path, version: int) -> Manifest:
    """Raises `FileNotFoundError` when the version is gone, `WeightsError` when it cannot be read."""
    try:
        given = json.loads((path / _name(version) / MANIFEST).read_bytes())
        layout = tuple((name, dtype, tuple(shape)) for name, dtype, shape in given.pop("layout"))
        manifest = Manifest(**given, layout=layout)
        if manifest.format != FORMAT or manifest.version != version:
            raise ValueError(f"format {manifest.format!r}, version {manifest.version}")
        if manifest.base is not None and not isinstance(manifest.base, int):
            raise ValueError(f"base {manifest.base!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{_name(version)}/{MANIFEST} cannot be read ({error}); publish a newer version.") from None
    return manifest


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _weights_sha256(layout: Layout, flat: Tensor) -> str:
    digest = hashlib.sha256(layout.to_bytes())
    digest.update(flat.numpy().data)
    return digest.hexdigest()
