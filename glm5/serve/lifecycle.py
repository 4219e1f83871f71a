"""What a server is doing: it takes requests, or it drains (ends what runs and takes nothing new).

The listener stays open while a server drains, so that `/health` says `draining` and new requests get a sentence and
a `Retry-After` instead of a refused connection.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from glm5.serve.errors import error_response


class Lifecycle:
    """Requests in flight, and whether new ones are taken."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0

    @property
    def status(self) -> str:
        """What `/health` says."""
        return "draining" if self.draining else "ready"


class CountRequests:
    """ASGI layer that counts requests up to the last byte of the response, and refuses work while draining."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app = app
        self.lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.lifecycle.draining and scope["method"] == "POST":
            refusal = error_response(
                scope, 503, "This server is about to end and takes no new requests; ask again in a moment.",
                headers={"Retry-After": "5", "Connection": "close"},
            )  # fmt: skip
            await refusal(scope, receive, send)
            return
        self.lifecycle.in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.lifecycle.in_flight -= 1
