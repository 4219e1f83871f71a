"""Between the work and a client that reads slowly."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm5.serve.limits import Limits


class SendAtLeisure:
    """ASGI layer that keeps what a client has not taken yet.

    The work never waits for the client: what it sends is kept (up to a limit), so its place is free as soon as it has
    ended. A client that takes nothing for `stall_seconds` is cut off.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.stall_seconds, self.max_bytes = limits.stall_seconds, limits.max_unsent_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app and, beside it, the sending of what it gave."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        unsent: deque[Message | None] = deque()
        size = 0
        more, less = asyncio.Event(), asyncio.Event()

        async def keep(message: Message) -> None:
            nonlocal size
            while size > self.max_bytes:
                less.clear()
                await less.wait()
            unsent.append(message)
            size += len(message.get("body", b""))
            more.set()

        async def deliver() -> None:
            nonlocal size
            while True:
                while not unsent:
                    more.clear()
                    await more.wait()
                message = unsent.popleft()
                if message is None:
                    return
                async with asyncio.timeout(self.stall_seconds):
                    await send(message)
                size -= len(message.get("body", b""))
                less.set()

        sender = asyncio.ensure_future(deliver())
        work = asyncio.ensure_future(self.app(scope, receive, keep))
        try:
            await asyncio.wait({sender, work}, return_when=asyncio.FIRST_COMPLETED)
            if not sender.done():
                unsent.append(None)
                more.set()
                await sender
            elif sender.exception() is not None:  # the client stalled: the server closes its connection
                return
            await work
        except TimeoutError:
            return
        finally:
            for task in (sender, work):
                task.cancel()
            await asyncio.gather(sender, work, return_exceptions=True)
