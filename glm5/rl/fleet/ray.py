"""Engines as Ray actors, for several machines (extra `cluster`). `ray.init(...)` comes first and is the caller's.

Ray chooses the machine and carries the weights (one object per version, which each machine gets once). Everything else
is what the engines in processes do: the same worker behind a connection, over TCP here, with a key of its own for each
engine. An actor whose node dies is started anew wherever there is room.

Ray connects by itself at any call of an unconnected process, also at one of a thread that is late, and then to a
cluster that nobody asked for. So all calls of an executor are made under its lock, and none after its `close`.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm5.errors import FleetError, InputError
from glm5.rl.fleet.channel import ChannelMember
from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.member import Events
from glm5.rl.fleet.worker import Build, Worker
from glm5.rl.weights import Layout, Snapshot
from glm5.rl.weights.layout import checksum

try:
    import ray
except ImportError:
    raise InputError("Engines on a cluster need the package ray; install glm5[cluster].") from None

CONNECT_SECONDS = 10.0


class RayEngine:
    """The actor: an engine that waits for one connection and serves it."""

    def __init__(self, build: Build, recompute: bool | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._key = os.urandom(32)
        self._listener = Listener((ray.util.get_node_ip_address(), 0), authkey=self._key)
        self._build, self._recompute = build, recompute
        threading.Thread(target=self._serve, name="glm5-engine-actor", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
                break
            except (OSError, EOFError, AuthenticationError):  # somebody else knocked
                continue
        self._listener.close()
        self._worker = Worker(connection, self._build, recompute=self._recompute)
        self._worker.run()

    def address(self) -> tuple[str, int, bytes]:
        """Host, port and key of the connection."""
        host, port = self._listener.address
        return host, int(port), self._key

    def node(self) -> str:
        """Where it runs."""
        return str(ray.get_runtime_context().get_node_id())

    def update(self, told: Sequence[tuple[int, Layout, int]], *data_N: np.ndarray) -> int:
        """Takes weights, as bytes in the node's shared memory, in this order; the version that the engine then has.

        told: version, layout and checksum of each.
        """
        for (version, layout, expected), bytes_N in zip(told, data_N, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the bytes cannot be written to, and are not
                flat = torch.from_numpy(bytes_N)
            if checksum(flat, version) != expected:
                raise FleetError(f"Weights of version {version} were damaged on their way; publish a newer version.")
            self._worker.update(Snapshot(version, layout.unpack(flat)))
        return self._worker.engine.version


class RayMember(ChannelMember):
    """An actor: requests and tokens over the connection, weights from Ray's object store."""

    actor: Any
    weights_of: RayExecutor

    def update(self, version: int) -> Future[int]:
        """Takes the newest weights, whole ones and adapters, the older first."""
        return self.weights_of.update(self.actor)


class RayExecutor:
    """Starts engines as actors that take `num_cpus`, `num_gpus` and `resources` of a node each.

    recompute: as in `Engine.update_weights`. threads: torch's, of each engine.
    """

    outlived = False

    def __init__(
        self, build: Build, *, recompute: bool | None = None, threads: int = 1, num_cpus: float = 1.0,
        num_gpus: float = 0.0, resources: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        if not ray.is_initialized():
            raise FleetError("Ray is not connected; call ray.init() or ray.init(address=...) first.")
        self._arguments = (build, recompute, threads)
        self._actor_class = ray.remote(RayEngine).options(
            num_cpus=num_cpus, num_gpus=num_gpus, resources=dict(resources or {}), max_restarts=0,
            max_concurrency=2, scheduling_strategy="SPREAD",
        )  # fmt: skip
        self._snapshots: dict[Layout, tuple[tuple[int, Layout, int], Any]] = {}
        """The newest of whole weights and of adapters, in the order of their versions: what is told of them, and they
        themselves."""
        self._actors: set[Any] = set()
        """Those that were not killed, also those that are not up yet."""
        self._closed = False
        self._lock = threading.Lock()
        """Of the above, and of calls to Ray."""

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Under the lock. Raises `FleetError` when there is no Ray to call, or shall be none."""
        with self._lock:
            if self._closed or not ray.is_initialized():
                raise FleetError("the connection to Ray was closed")
            yield

    def launch(self, name: str, events: Events, config: FleetConfig) -> RayMember:
        """See `Executor.launch`. An actor for which no node has room counts as one that does not come up."""
        with self._connected():
            actor: Any = self._actor_class.remote(*self._arguments)
            self._actors.add(actor)
            address: Future[tuple[str, int, bytes]] = actor.address.remote().future()
        try:
            host, port, key = address.result(config.start_seconds)
            connection = connect(host, port, key)
        except (ray.exceptions.RayError, OSError, EOFError, AuthenticationError) as error:  # a timeout is an OSError
            self._kill(actor)
            what = (str(error).splitlines() or [f"nothing within {config.start_seconds:g} s"])[0]
            raise FleetError(f"no actor came up ({type(error).__name__}: {what})") from None
        member = RayMember(
            connection, events, config, weights=tuple, kill=lambda: self._kill(actor), gone=lambda seconds: False
        )
        member.actor, member.weights_of = actor, self
        return member

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Puts the weights into the object store; the version before is let go."""
        layout = Layout.of(tensors)
        flat = layout.pack(tensors)
        with self._connected():
            self._snapshots.pop(layout, None)
            self._snapshots[layout] = ((version, layout, checksum(flat, version)), ray.put(flat.numpy()))

    def update(self, actor: Any) -> Future[int]:
        """The actor takes the snapshots, by one call: two would run side by side there, and the newer may win."""
        future: Future[int] = Future()
        try:
            with self._connected():
                told, data = zip(*self._snapshots.values(), strict=True)
                future = actor.update.remote(told, *data).future()
        except FleetError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Lets the weights go, and kills the actors that are still coming up."""
        with self._lock:
            self._closed = True
            if ray.is_initialized():
                for actor in self._actors:
                    ray.kill(actor)
            self._actors.clear()
            self._snapshots.clear()

    def _kill(self, actor: Any) -> None:
        """Once; without a connection it has ended with it."""
        with self._lock:
            if actor in self._actors and ray.is_initialized():
                ray.kill(actor)
            self._actors.discard(actor)


def connect(host: str, port: int, key: bytes) -> Connection:
    """`Client` with a time limit. Raises `TimeoutError`, and what it raises."""
    connected: Future[Connection] = Future()

    def work() -> None:
        try:
            connected.set_result(Client((host, port), authkey=key))
        except BaseException as error:
            connected.set_exception(error)

    threading.Thread(target=work, name="glm5-connect", daemon=True).start()
    return connected.result(CONNECT_SECONDS)
