"""Serves the chat page: `GET /` and the files below `/page/`, read once, with strict headers.

What the model writes is untrusted text. The page shows it through DOM nodes only, and the content security policy holds
even if that failed: scripts and styles come from this server alone, no string becomes markup, nothing is loaded from or
sent to anywhere else. The page needs no key; the API that it calls may ask for one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Cache-Control": "no-cache",  # kept by the browser, asked for by its hash: a new version shows at once
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def install_page(app: FastAPI) -> None:
    """Adds the page's routes to an app."""
    files = {path.name: path for path in sorted(Path(__file__).parent.iterdir()) if path.suffix in TYPES}
    for name, path in files.items():
        _add(app, "/" if name == "index.html" else f"/page/{name}", path.read_bytes(), TYPES[path.suffix])


def _add(app: FastAPI, route: str, body: bytes, media_type: str) -> None:
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}

    async def file(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    app.add_api_route(route, file, methods=["GET", "HEAD"], include_in_schema=False)
