"""Runs the application under uvicorn: bound before anything is printed, and drained before it ends.

The first Ctrl-C or SIGTERM lets running requests end while new ones are refused. Those that outlast the limit are given
up: they are answered with what is there. Then the exit is orderly. The second ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from glm5.errors import InputError
from glm5.serve.connection import connections
from glm5.serve.ending import Endings
from glm5.serve.lifecycle import Lifecycle

DRAIN_SECONDS = 30.0
LAST_WORDS_SECONDS = 2.0
"""For the replies of what was given up, and for what clients have not taken yet."""
BACKLOG = 2048
SPARE_FILES = 128
"""Open files that are no connections."""
KEEP_ALIVE_SECONDS = 75
"""That an idle connection stays open. httpx, and so the `openai` and `anthropic` packages, use one again within 5 s; a
server that closes after the same time, as uvicorn does by default, resets what they send in that moment."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `InputError` when the address cannot be had."""
    if not 0 <= port <= 65535:
        raise InputError(f"The port is {port}; it must be from 0 (any free one) to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # who connects before the loop runs waits instead of being refused
    except OSError as error:
        listener.close()
        raise InputError(f"Cannot listen on {host}:{port} ({error.strerror}); choose another, or --port 0.") from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reachable from this machine only."""
    return host in ("localhost", "::1") or host.startswith("127.")


def serve(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 0,
    ready: Callable[[str], None] | None = None,
    *,
    drain_seconds: float = DRAIN_SECONDS,
) -> None:
    """Serves until Ctrl-C or SIGTERM; running requests then have `drain_seconds` to end.

    `ready` is called with the base URL once the port is bound; requests that come before the first are queued.
    """
    service = app.state.service
    with bind(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        if ready:
            ready(f"http://{name}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, backlog=BACKLOG, ws="none",
            http=connections(min(service.limits.connections, max(1, _open_files() - SPARE_FILES))),
            timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=round(LAST_WORDS_SECONDS),
        )  # fmt: skip
        _Server(config, app.state.lifecycle, service.endings, drain_seconds).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's server, told to end by a lifecycle instead of by signals."""

    def __init__(
        self, config: uvicorn.Config, lifecycle: Lifecycle, endings: Endings, drain_seconds: float
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.lifecycle, self.endings, self.drain_seconds = lifecycle, endings, drain_seconds
        self.limit = float("inf")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes both signals while the server runs; unlike uvicorn's own, does not raise them once more at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._drain) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _drain(self, number: int, _: FrameType | None) -> None:
        if self.lifecycle.draining:
            os._exit(128 + number)  # asked twice: at once, whatever still runs
        self.lifecycle.draining = True
        self.limit = time.monotonic() + self.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether the server should end."""
        if self.lifecycle.draining:
            late = time.monotonic() - self.limit
            if late > 0:
                self.endings.give_up()
            if late > LAST_WORDS_SECONDS:
                for connection in self.server_state.connections:
                    connection.transport.abort()  # their requests take it for a client that left, and end
                return True
            if not self.lifecycle.in_flight:
                return True
        return await super().on_tick(counter)


def _open_files() -> int:
    """This process's limit of open files, which is 1,024 on many systems, raised as far as it may be."""
    most = 65_536
    with contextlib.suppress(ImportError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most
