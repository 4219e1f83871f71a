"""One JSON line per request, without a word of what was said: method, path, status, times, token counts, request id.

The id is the client's own `X-Request-ID` where it is a plain word, a fresh one otherwise; it goes back in the headers
`X-Request-ID` (OpenAI's clients read it) and `request-id` (Anthropic's). Exceptions are logged by type and place:
their messages may quote a user.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm5.serve.metrics import Metrics

log = logging.getLogger("glm5.serve.access")
PLAIN_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is remembered of a request that ended. Times in seconds; token counts are None if nothing was generated."""

    request_id: str
    method: str
    route: str
    """The path as the app declares it; `unknown` for what it does not serve."""
    status: int
    """499 when the client left before a response began."""
    seconds: float
    complete: bool
    """Whether the whole response was handed over."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reasons: tuple[str, ...] = ()
    first_token_seconds: float | None = None
    token_seconds: float | None = None
    """Mean time between two tokens of one sample."""


class AccessLog:
    """ASGI layer around everything else: gives each request its id, and its figures to the log and the metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Follows one request from its first byte to its last."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        began = time.perf_counter()
        status, complete = 499, False
        named = [(b"x-request-id", request_id.encode()), (b"request-id", request_id.encode())]

        async def watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *named]}
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, watched)
        finally:
            generation = state.get("generation")
            figures = Figures(
                request_id=request_id, method=scope["method"], route=getattr(scope.get("route"), "path", "unknown"),
                status=status, seconds=time.perf_counter() - began, complete=complete,
                **({} if generation is None else generated(generation, began)),
            )  # fmt: skip
            self.metrics.observe(figures)
            fields = {name: round(value, 6) if isinstance(value, float) else value
                      for name, value in asdict(figures).items() if value not in (None, ())}  # fmt: skip
            log.log(level_of(figures), "request", extra={"fields": fields})


def level_of(figures: Figures) -> int:
    """What monitors ask for every few seconds is not worth a line."""
    return logging.DEBUG if figures.route in ("/health", "/metrics") else logging.INFO


def generated(generation: Any, began: float) -> dict[str, Any]:
    """The figures of a `Generation`, for a request that began at `began` (`time.perf_counter`)."""
    begun = [sample for sample in generation.samples if sample.tokens]
    first = min((sample.first_token_at for sample in begun), default=None)
    pauses = sum(len(sample.tokens) - 1 for sample in begun)  # samples run side by side, so each has its own
    waited = sum(sample.last_token_at - sample.first_token_at for sample in begun)
    return {
        "prompt_tokens": generation.prompt_tokens,
        "cached_tokens": generation.cached_tokens,
        "output_tokens": generation.completion_tokens,
        "finish_reasons": tuple(sample.finish_reason for sample in generation.samples),
        "first_token_seconds": None if first is None else first - began,
        "token_seconds": waited / pauses if pauses else None,
    }


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if PLAIN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


class JsonLines(logging.Formatter):
    """A log record as one JSON object on a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Exceptions by type and place only."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            frames = traceback.extract_tb(record.exc_info[2])
            line["exception"] = record.exc_info[0].__name__
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line, default=str)


def log_json_lines(stream: TextIO = sys.stderr, *, requests: bool = True) -> None:
    """Sends the server's log, and uvicorn's warnings, to `stream`; without `requests`, only what went wrong."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name, level in (("glm5.serve", logging.INFO if requests else logging.WARNING), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
