"""Pages of other sites that may use this server: none, unless they are named (CORS)."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from glm5.errors import InputError

EXPOSED = ("X-Request-ID", "Retry-After")


def install_cross_origin(app: FastAPI, origins: Iterable[str]) -> None:
    """Lets pages of these origins read the answers. A key is a header, no cookie, so no credentials are allowed.

    Raises `InputError` for what no browser sends as an origin.
    """
    allowed = list(origins)
    for origin in allowed:
        parts = urlsplit(origin)
        if origin != "*" and (parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"):
            raise InputError(
                f"{origin!r} is no origin; give scheme, host and port without a slash behind, such as "
                "https://chat.example:8443, or *."
            )
    if allowed:
        app.add_middleware(
            CORSMiddleware, allow_origins=allowed, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"],
            expose_headers=EXPOSED,
        )  # fmt: skip
