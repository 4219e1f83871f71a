"""Every version of a run as a directory beside it, for `glm5 serve --weights-from`: the model as it learns."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from glm5.errors import WeightsError
from glm5.rl.weights.directory import DirectoryPublisher, versions
from glm5.threads import in_thread

log = logging.getLogger("glm5.rl")


def check_unused(path: Path) -> None:
    """Raises `WeightsError` for a directory that holds versions already: those of a new run would take their place."""
    if versions(path):
        raise WeightsError(
            f"{path} holds weights of another run (version {max(versions(path))}); publish to a new directory, or "
            "remove it."
        )


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
