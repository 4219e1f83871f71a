"""Between the work and a client that reads slowly."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm5.serve.limits import Limits

LITTLE_BYTES = 64 * 1024
"""What may wait for a client when too much waits for all of them."""


class SendAtLeisure:
    """ASGI layer that keeps what a client has not taken yet.

    The work never waits for the client: what it sends is kept, so its place is free as soon as it has ended. Up to a
    limit for each client, and one for all: beyond it each may still have a little waiting, so that those who read are
    served while the work of the others pauses. A client that takes nothing for `stall_seconds` is cut off.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.stall_seconds, self.max_bytes = limits.stall_seconds, limits.max_unsent_bytes
        self.max_total, self.total = limits.max_unsent_total_bytes, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app and, beside it, the sending of what it gave."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        unsent: deque[Message | None] = deque()
        size = 0
        more, less = asyncio.Event(), asyncio.Event()

        def count(message: Message, sign: int) -> None:
            nonlocal size
            bytes_ = sign * len(message.get("body", b""))
            size, self.total = size + bytes_, self.total + bytes_

        async def keep(message: Message) -> None:
            while size > (self.max_bytes if self.total <= self.max_total else LITTLE_BYTES):
                less.clear()
                await less.wait()
            unsent.append(message)
            count(message, 1)
            more.set()

        async def deliver() -> None:
            while True:
                while not unsent:
                    more.clear()
                    await more.wait()
                message = unsent.popleft()
                if message is None:
                    return
                async with asyncio.timeout(self.stall_seconds):
                    await send(message)
                count(message, -1)
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
            self.total -= size
