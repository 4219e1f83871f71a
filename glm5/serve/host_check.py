"""Which names a server on this machine answers to: a guard against DNS rebinding.

A page of another site can point its own name at 127.0.0.1 and then read what a server there says, because the browser
takes both for one origin. The `Host` header still carries the foreign name, so a server without a key answers only to
the names of this machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from glm5.serve.errors import error_response

OWN_NAMES = ("localhost", "127.0.0.1", "::1")


class CheckHost:
    """ASGI layer that answers 421 to requests for a host of another name. Ports do not matter."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self.app, self.hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets through what names one of the hosts."""
        if scope["type"] != "http" or _host(scope) in self.hosts:
            await self.app(scope, receive, send)
            return
        message = (
            "This server answers to the names of its own machine only; ask for http://127.0.0.1, start it with "
            "--allow-host NAME, or require a key."
        )
        refusal = error_response(scope, 421, message, code="unknown_host", headers={"Connection": "close"})
        await refusal(scope, receive, send)


def _host(scope: Scope) -> str | None:
    """The name in the `Host` header, without port and brackets; None if there is none that can be read."""
    values = [value for name, value in scope["headers"] if name == b"host"]
    if len(values) != 1:
        return None
    try:
        return urlsplit(f"//{values[0].decode('ascii').strip()}").hostname
    except ValueError:
        return None
