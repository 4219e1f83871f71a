"""One connection: uvicorn's, with limits for clients that hold it without sending a request or reading the answer.

uvicorn closes a connection that is idle between two requests and leaves open one that has sent nothing, or half a head.
Its only limit of their number answers requests with 503 once idle ones are many, whoever asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("glm5.serve")

HEAD_SECONDS = 30.0
"""From a connection's beginning, or from the first byte behind a request, to the end of the next request's head."""
UNSENT_BYTES = 32 * 1024
"""Kept by the kernel beyond what is under way. Its own choice, some megabytes, would hide for minutes whether a slow
client reads (`SendAtLeisure`)."""


def connections(most: int) -> type[asyncio.Protocol]:
    """The connections of a server that has at most so many; one more is closed, which clients take for "try again"."""

    class Connection(H11Protocol):
        head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.app_state = {**self.app_state, "transport": transport}  # in the state of each request's scope
            with contextlib.suppress(AttributeError, OSError):  # not every system has it
                transport.get_extra_info("socket").setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES
                )
            if len(self.connections) == most:
                log.warning("%d connections are open, more are closed at once", most)
            if len(self.connections) > most:
                transport.abort()
                return
            self.expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.expect_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()  # begins the next request if it is here
            if self.conn.trailing_data[0] and not self.transport.is_closing():
                self.expect_head()  # its first bytes came before the answer's end

        def connection_lost(self, exc: Exception | None) -> None:
            self.forget_head()
            super().connection_lost(exc)

        def expect_head(self) -> None:
            """Limits the time to the end of a head, unless an answer is being made."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.forget_head()
            elif self.head is None:
                self.head = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

        def forget_head(self) -> None:
            if self.head is not None:
                self.head.cancel()
                self.head = None

    return Connection
