"""The weights that an executor keeps for its engines, written one version after the other in a thread of their own.

To check, compress and write the weights of a large model takes minutes, and in the event loop rollouts and signs of
life would wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from torch import Tensor

from glm5.errors import FleetError
from glm5.rl.fleet.member import Executor, Facts
from glm5.rl.weights.checks import check_publication
from glm5.threads import OneThread


class Snapshots:
    """Those of one fleet. All is awaited in an event loop, and done in the order of the calls, awaited or not."""

    def __init__(self, executor: Executor) -> None:
        self.newest = -1
        """The version that the executor has."""
        self._executor, self._closed = executor, False
        self._in_thread = OneThread()

    def write(self, version: int, tensors: Mapping[str, Tensor], facts: Facts) -> asyncio.Future[None]:
        """A version, for engines of which `facts` are known. Raises `InputError` and `WeightsError` as they would."""
        if self._closed:
            raise FleetError("This fleet is closed; make a new one.")
        return self._in_thread(self._write, version, tensors, facts)

    def settled(self) -> asyncio.Future[int]:
        """The newest version, once none is being written."""
        return self._in_thread(lambda: self.newest)

    async def close(self) -> None:
        """Closes the executor, once nothing is being written."""
        self._closed = True
        try:
            await self._in_thread(self._executor.close)
        finally:
            self._in_thread.close()

    def _write(self, version: int, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        check_publication(version, tensors, newest=max(self.newest, facts.version), shapes=facts.shapes)
        self._executor.snapshot(version, tensors)
        self.newest = version
