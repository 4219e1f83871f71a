"""Server-sent events that are never silent for long.

A prompt of 200,000 tokens is read for minutes, and proxies cut a connection that says nothing for one. So after
`pause_seconds` without an event the protocol's own sign of life is sent: a comment, or Anthropic's `ping`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

COMMENT = ": keep-alive\n\n"
PING = 'event: ping\ndata: {"type": "ping"}\n\n'


class EventStream(StreamingResponse):
    """A response that calls `leave` however it ends, even before the first event."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None], pause: str, pause_seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.leave = leave
        self.sign = {"type": "http.response.body", "body": pause.encode(), "more_body": True}
        self.pause_seconds = pause_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events, and signs of life between them."""
        loop, turn, latest = asyncio.get_running_loop(), asyncio.Lock(), 0.0
        signs: asyncio.Task[None] | None = None

        async def keep_alive() -> None:
            nonlocal latest
            while True:
                await asyncio.sleep(latest + self.pause_seconds - loop.time())
                async with turn:  # an event may be on its way
                    if loop.time() >= latest + self.pause_seconds:
                        await send(self.sign)
                        latest = loop.time()

        async def event(message: Message) -> None:
            nonlocal latest, signs
            async with turn:
                await send(message)
                latest = loop.time()
                if message["type"] == "http.response.start":
                    signs = asyncio.create_task(keep_alive())
                elif signs is not None and not message.get("more_body", False):
                    signs.cancel()  # nothing may follow the end

        try:
            await super().__call__(scope, receive, event)
        finally:
            self.leave()
            if signs is not None:
                signs.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await signs
