"""Limits that keep one client from hurting the others: how many, how large, how long."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm5.engine.admission import MOST_SECONDS
from glm5.serve.errors import ApiError, error_response

LINGER_BYTES, LINGER_SECONDS = 256 * 2**20, 30.0
"""How much of a refused body is read and thrown away, so that a client that is still sending sees the refusal."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server accepts."""

    max_body_bytes: int = 8 * 2**20
    body_seconds: float = 60.0
    """Time for a body to arrive."""
    max_concurrent: int = 64
    """Requests that run at once."""
    max_waiting: int = 1024
    """Requests that wait for one of these places; one more is answered with 429."""
    spare_connections: int = 4096
    """Connections that may be open beyond one for each request that runs or waits; one more is closed at once."""
    deadline_seconds: float | None = None
    """Longest time that a request may take, waiting and rendering included; a client may ask for less."""
    pause_seconds: float = 12.0
    """A stream that has nothing to say for this long gives a sign of life."""
    stall_seconds: float = 60.0
    """A client that takes nothing for this long is cut off."""
    max_unsent_bytes: int = 64 * 2**20
    """What is kept for one client that reads slowly."""
    max_unsent_total_bytes: int = 2**30
    """What is kept for all of them; beyond it each may have `LITTLE_BYTES` waiting (see `SendAtLeisure`)."""
    max_messages: int = 2048
    """Messages of a conversation."""
    max_n: int = 16
    """Samples of one prompt."""

    @property
    def connections(self) -> int:
        """That are open at once."""
        return self.max_concurrent + self.max_waiting + self.spare_connections


def deadline_of(headers: Mapping[str, str], limits: Limits) -> float | None:
    """Seconds that a request may take: the header `X-Request-Timeout`, at most the server's own limit.

    Raises `ApiError` (400) for a header that is no number of seconds. A week is as much as any number above it.
    """
    asked = headers.get("x-request-timeout")
    if asked is None:
        return limits.deadline_seconds
    try:
        seconds = float(asked)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # nor what is no number
        raise ApiError(400, "The header X-Request-Timeout must be a number of seconds above 0.")
    return min(seconds, MOST_SECONDS if limits.deadline_seconds is None else limits.deadline_seconds)


class BodyLimit:
    """ASGI layer that answers 413 before a body larger than the limit is held in memory, and 408 to a slow one."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float = 60.0) -> None:
        self.app = app
        self.max_bytes, self.seconds = max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the bytes as they come; a stated length is believed only when it is already too large."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self.max_bytes:
            await self._refuse(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._read(receive)
        except TimeoutError:
            refusal = error_response(
                scope, 408, f"The body did not arrive within {self.seconds:g} seconds; send it again.",
                headers={"Connection": "close"},
            )  # fmt: skip
            await refusal(scope, receive, send)
            return
        except OverflowError:
            await self._refuse(scope, receive, send)
            return
        if body is None:
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None when the client went away. Raises `OverflowError` for one that is too large."""
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
            if size > self.max_bytes:
                raise OverflowError
        return b"".join(chunks)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends 413 at once, then lets the client finish sending: a connection reset would hide the answer."""
        refusal = error_response(
            scope, 413, f"The body is larger than {self.max_bytes} bytes; send less.", headers={"Connection": "close"}
        )
        await send({"type": "http.response.start", "status": refusal.status_code, "headers": refusal.raw_headers})
        await send({"type": "http.response.body", "body": refusal.body, "more_body": True})
        dropped, more = 0, True
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while more and dropped < LINGER_BYTES:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
