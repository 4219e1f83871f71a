"""Engines in processes of their own on this machine: the default executor, with nothing to install.

Each is forked from a server that has imported this package and computed nothing: as clean as a process started anew,
and there in a moment when one has died. It has one torch thread unless told otherwise, talks over a pipe and reads
weights from shared memory. When this process dies, even by kill -9, the pipes break and the engines end themselves; the
shared memory is removed by the resource tracker of `multiprocessing`. As always with that module, a script that starts
a fleet does so under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from glm5.errors import InputError
from glm5.rl.fleet.channel import ChannelMember
from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.member import Events
from glm5.rl.fleet.worker import Build, Worker
from glm5.rl.weights import Layout, SharedPublisher, SharedSubscriber

CONTEXT = multiprocessing.get_context("forkserver")
KILL_SECONDS = 10.0


@dataclass(frozen=True)
class SharedSource:
    """Opens the shared memory of that name."""

    name: str

    def open(self) -> SharedSubscriber:
        """The subscriber."""
        return SharedSubscriber(self.name)


class ProcessExecutor:
    """Starts engines as processes. recompute: as in `Engine.update_weights`. threads: torch's, of each engine."""

    outlived = False

    def __init__(self, build: Build, *, recompute: bool | None = None, threads: int = 1) -> None:
        if threads < 1:
            raise InputError(f"An engine computes with at least one thread, not {threads}.")
        self.build, self.recompute, self.threads = build, recompute, threads
        self._publishers: dict[Layout, SharedPublisher] = {}

    def launch(self, name: str, events: Events, config: FleetConfig) -> ChannelMember:
        """See `Executor.launch`."""
        CONTEXT.set_forkserver_preload(["glm5.rl.fleet.processes"])
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=_engine, args=(theirs, self.build, self.recompute, self.threads), name=f"glm5-engine-{name}",
            daemon=True,
        )  # fmt: skip
        with without_interrupts():
            process.start()
        theirs.close()

        def gone(seconds: float) -> bool:
            process.join(seconds)
            return process.exitcode is not None

        def kill() -> None:
            process.kill()
            process.join(KILL_SECONDS)

        return ChannelMember(ours, events, config, weights=self._sources, kill=kill, gone=gone, process_id=process.pid)

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the weights into shared memory. Whole weights and adapters have a mapping each."""
        layout = Layout.of(tensors)
        if layout not in self._publishers:
            self._publishers[layout] = SharedPublisher(layout)
        self._publishers[layout].publish(version, tensors)

    def close(self) -> None:
        """Removes the shared memory."""
        for publisher in self._publishers.values():
            publisher.close()
        self._publishers.clear()

    def _sources(self) -> tuple[SharedSource, ...]:
        return tuple(SharedSource(p.name) for p in sorted(self._publishers.values(), key=lambda p: p.version or 0))


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal. Those begun here, and what forks them, do not hear it."""
    resource_tracker.ensure_running()  # it would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _engine(connection: Connection, build: Build, recompute: bool | None, threads: int) -> None:
    """What the process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the fleet decides when engines end
    torch.set_num_threads(threads)
    Worker(connection, build, recompute=recompute).run()
