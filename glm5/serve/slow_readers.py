"""Between the work and a client that reads slowly."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm5.serve.limits import Limits

LITTLE_BYTES = 64 * 1024
"""What may wait for a client when too much waits for all of them."""
LOOKS = 4
"""How often within `stall_seconds` it is looked whether a client has taken something."""
LAST_LOOK_SECONDS = 0.05
"""Between two looks whether a client has taken the end of its answer."""


class SendAtLeisure:
    """ASGI layer that keeps what a client has not taken yet.

    The work never waits for the client: what it sends is kept, so its place is free as soon as it has ended. Up to a
    limit for each client, and one for all: beyond it each may still have a little waiting, so that those who read are
    served while the work of the others pauses. A client that takes nothing for `stall_seconds` is cut off. One that
    takes little is not: behind `connection.py` it is seen how much waits in its connection.
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
        transport: asyncio.Transport | None = scope.get("state", {}).get("transport")
        outbox = _Outbox(self, send, transport)
        work, sender, stalled = (
            asyncio.ensure_future(task)
            for task in (self.app(scope, receive, outbox.keep), outbox.deliver(), outbox.stall())
        )
        try:
            await asyncio.wait({work, sender, stalled}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                outbox.put(None)
                await asyncio.wait({sender, stalled}, return_when=asyncio.FIRST_COMPLETED)
                await work
            if stalled.done():
                if transport is not None:
                    transport.abort()  # what it has not taken is forgotten
            elif work.done():
                await sender
        finally:
            for task in (work, sender, stalled):
                task.cancel()
            await asyncio.gather(work, sender, stalled, return_exceptions=True)
            self.total -= outbox.size


class _Outbox:
    """What waits for one client."""

    def __init__(self, all_: SendAtLeisure, send: Send, transport: asyncio.Transport | None) -> None:
        self.all, self.send, self.transport = all_, send, transport
        self.size = 0
        self._unsent: deque[Message | None] = deque()
        self._more, self._less = asyncio.Event(), asyncio.Event()
        self._handed, self._sending = 0, False

    def put(self, message: Message | None) -> None:
        """Adds a message; None behind the last."""
        self._unsent.append(message)
        self._more.set()

    async def keep(self, message: Message) -> None:
        """What the app sends to; it waits only when too much is kept."""
        while self.size > (self.all.max_bytes if self.all.total <= self.all.max_total else LITTLE_BYTES):
            self._less.clear()
            await self._less.wait()
        self._count(message, 1)
        self.put(message)

    async def deliver(self) -> None:
        """Sends everything, as the client takes it."""
        while True:
            while not self._unsent:
                self._more.clear()
                await self._more.wait()
            message = self._unsent.popleft()
            self._handed, self._sending = self._handed + 1, True
            if message is None:
                while self._behind():  # the last message may be large
                    await asyncio.sleep(LAST_LOOK_SECONDS)
                return
            await self.send(message)
            self._sending = False
            self._count(message, -1)
            self._less.set()

    async def stall(self) -> None:
        """Returns when the client has taken nothing of what it is sent for so long."""
        loop, before, since = asyncio.get_running_loop(), (0, 0), 0.0
        while True:
            now = (self._handed, self._behind())
            if now != before or not self._sending:
                before, since = now, loop.time()
            elif loop.time() - since >= self.all.stall_seconds:
                return
            await asyncio.sleep(self.all.stall_seconds / LOOKS)

    def _behind(self) -> int:
        """Bytes that wait in the connection; their number falls when the client reads."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def _count(self, message: Message, sign: int) -> None:
        bytes_ = sign * len(message.get("body", b""))
        self.size, self.all.total = self.size + bytes_, self.all.total + bytes_
