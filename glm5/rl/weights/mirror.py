"""Every version of a run as a directory beside it, for `glm5 serve --weights-from`: the model as it learns."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from glm5.errors import WeightsError
from glm5.files import write_json
from glm5.rl.weights.directory import MODEL_PREFIX, DirectoryPublisher, versions
from glm5.threads import in_thread
from glm5.train import RunDirectory

log = logging.getLogger("glm5.rl")


OWNER = "owner.json"
"""In a directory of versions: the run whose versions they are."""


def check_unused(path: Path) -> None:
    """Raises `WeightsError` for a directory that holds versions already: those of a new run would take their place."""
    found = [*versions(path), *versions(path, MODEL_PREFIX)]
    if found:
        raise WeightsError(
            f"{path} holds weights of another run (version {max(found)}); publish to a new directory, or remove it."
        )


def claim(path: Path, run: RunDirectory) -> None:
    """Notes whose versions a directory holds. Raises `WeightsError` for one with versions that are not this run's."""
    if not claimed(path, run):
        check_unused(path)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / OWNER, {"kind": "weights", "id": run.id})


def claimed(path: Path, run: RunDirectory) -> bool:
    """Whether a directory is noted as holding this run's versions."""
    owner = path / OWNER
    return owner.exists() and json.loads(owner.read_text()).get("id") == run.id


class Mirror:
    """Writes versions in a thread. A disk that refuses is noted: it does not stop the run."""

    def __init__(self, path: Path, *, after: int, every: int = 1) -> None:
        """after: the run goes on from this version; later ones come anew. every: versions between two."""
        self._publisher, self._every = DirectoryPublisher(path, after=after), every

    def wants(self, version: int, *, last: bool = False) -> bool:
        """Whether it is to be written; the last one always is."""
        newest = self._publisher.version
        return (last or version % self._every == 0) and (newest is None or version > newest)

    async def write(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """The tensors are copied before the first await."""
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            await in_thread(self._publisher.publish, version, copies)
        except (OSError, WeightsError) as error:
            log.warning("Version %d was not written to %s: %s", version, self._publisher.path, error)
