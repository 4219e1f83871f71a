"""Limits that keep one client from hurting the others: bytes of a body, requests at once."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm5.serve.errors import ApiError, error_body


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server accepts."""

    max_body_bytes: int = 8 * 2**20
    max_concurrent: int = 32
    max_messages: int = 2048
    max_n: int = 16


class BodyLimit:
    """ASGI layer that answers 413 before a body larger than the limit is held in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the bytes as they come; a stated length is believed only when it is already too large."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = error_body(413, f"The body is larger than {self.max_bytes} bytes; send less.")
        refusal = JSONResponse(body, 413, {"Connection": "close"})
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self.max_bytes:
            await refusal(scope, receive, send)
            return
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
            if size > self.max_bytes:
                await refusal(scope, receive, send)
                return
        whole: Message | None = {"type": "http.request", "body": b"".join(chunks), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        await self.app(scope, replay, send)


class Gate:
    """Counts running requests; one too many is refused at once instead of waiting without end."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0

    def enter(self) -> None:
        """Takes a place or raises 429."""
        if self.running >= self.limit:
            raise ApiError(429, f"The server already runs {self.limit} requests; try again in a moment.")
        self.running += 1

    def leave(self) -> None:
        """Gives the place back."""
        self.running -= 1
