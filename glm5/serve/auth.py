"""The optional API key, as OpenAI's clients (`Authorization: Bearer`) and Anthropic's (`x-api-key`) send it.

The page and its files, and `/health`, need none: they hold nothing of a user. Keys are compared by digests in constant
time and are never logged.
"""

from __future__ import annotations

import hmac
from hashlib import sha256

from starlette.types import ASGIApp, Receive, Scope, Send

from glm5.errors import InputError
from glm5.serve.errors import error_response


def check_key(key: str) -> str:
    """The key itself; raises `InputError` for one that no HTTP header could carry."""
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise InputError("The API key must be printable ASCII without blanks at its ends; choose another.")
    return key


class RequireKey:
    """ASGI layer that answers 401 to requests without the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.digest = sha256(check_key(key).encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets through what carries the key in either header, and what needs none."""
        if scope["type"] != "http" or _is_open(scope) or any(map(self._matches, _keys(scope))):
            await self.app(scope, receive, send)
            return
        message = "This server needs its API key; send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'."
        refusal = error_response(
            scope, 401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer", "Connection": "close"}
        )
        await refusal(scope, receive, send)

    def _matches(self, key: bytes) -> bool:
        return hmac.compare_digest(sha256(key).digest(), self.digest)


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in ("/", "/health") or path.startswith("/page/"))


def _keys(scope: Scope) -> list[bytes]:
    """What the request offers as a key."""
    headers = [(name, value.strip()) for name, value in scope["headers"]]
    bearer = [
        value[7:].strip() for name, value in headers if name == b"authorization" and value[:7].lower() == b"bearer "
    ]
    return bearer + [value for name, value in headers if name == b"x-api-key"]
