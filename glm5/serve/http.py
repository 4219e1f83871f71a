"""Runs the application under uvicorn: bound before anything is printed, so that port 0 becomes a real number."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from glm5.errors import InputError


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `InputError` when the address cannot be had."""
    if not 0 <= port <= 65535:
        raise InputError(f"The port is {port}; it must be from 0 (any free one) to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(f"Cannot listen on {host}:{port} ({error.strerror}); choose another, or --port 0.") from None
    return listener


def serve(app: FastAPI, host: str = "127.0.0.1", port: int = 0, ready: Callable[[str], None] | None = None) -> None:
    """Serves until Ctrl-C or SIGTERM; running requests are given a moment to end.

    `ready` is called with the base URL once the port is bound; requests that come before the first are queued.
    """
    with bind(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        if ready:
            ready(f"http://{name}:{listener.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises Ctrl-C once more after its orderly end
            uvicorn.Server(config).run(sockets=[listener])
