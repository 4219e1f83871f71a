"""Speaks ASGI to an app directly, for what an HTTP client cannot do: leave, stall, send half a body."""

import asyncio
import json


def scope_of(path="/v1/chat/completions", method="POST", headers=()):
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "server": ("x", 1), "client": ("y", 2), "headers": [(b"content-type", b"application/json"), *headers],
    }  # fmt: skip


class Call:
    """One request: `sent` holds what the app answered; `leave()` is the client going away."""

    def __init__(self, app, scope, body=b"", *, stall=False):
        self.app, self.scope, self.body, self.stall = app, scope, body, stall
        self.sent, self.left, self.asked = [], asyncio.Event(), 0

    async def receive(self):
        self.asked += 1
        if self.asked == 1:
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if self.stall and self.sent:
            await self.left.wait()
        self.sent.append(message)

    def leave(self):
        self.left.set()

    async def run(self):
        await self.app(self.scope, self.receive, self.send)
        return self

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def json(self):
        return json.loads(b"".join(message.get("body", b"") for message in self.sent))
