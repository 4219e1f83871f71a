"""Errors as the clients of each protocol read them.

OpenAI's shape is `{"error": {"message", "type", "param", "code"}}`; below `/v1/messages` it is Anthropic's,
`{"type": "error", "error": {"type", "message"}, "request_id"}`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from glm5.errors import GLM5Error, InputError, TextError, UnavailableError

log = logging.getLogger("glm5.serve")

OPENAI_KINDS = {
    401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
}  # fmt: skip
ANTHROPIC_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
FAILED = "The server failed on this request; its log has the reason."
TOO_LATE = "The request's deadline passed before its work began; allow more time, or ask again when less waits."
GIVEN_UP = (
    "The request was given up before the answer was complete: its deadline passed, or the server ends; ask again."
)


class ApiError(GLM5Error):
    """A request that is answered with an error: an HTTP status, a sentence, and the field that is at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """details: what Anthropic's clients act on."""
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.details = details


def error_status(error: GLM5Error) -> int:
    """400 for what the client sent, 503 for what may work later, 500 for what is wrong with the model."""
    if isinstance(error, ApiError):
        return error.status
    if isinstance(error, UnavailableError):
        return 503
    return 400 if isinstance(error, InputError | TextError) else 500


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON body of an error, for OpenAI's clients."""
    kind = OPENAI_KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic_error_body(
    status: int, message: str, request_id: str | None = None, details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON body of an error, for Anthropic's clients."""
    kind = ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    more = {} if details is None else {"details": details}
    body: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": message, **more}}
    return body if request_id is None else {**body, "request_id": request_id}


def error_response(
    scope: Scope,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    details: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in the shape of the protocol that the path belongs to."""
    if scope["path"].startswith("/v1/messages"):
        body = anthropic_error_body(status, message, scope.get("state", {}).get("request_id"), details)
    else:
        body = error_body(status, message, param=param, code=code)
    return JSONResponse(body, status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Every error of the app leaves in these shapes, those of the framework too."""

    async def api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(
            request.scope, error.status, str(error), param=error.param, code=error.code, details=error.details,
            headers=_retry(error.status),
        )  # fmt: skip

    async def user_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, GLM5Error)
        status = error_status(error)
        return error_response(request.scope, status, str(error), headers=_retry(status))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            return error_response(request.scope, 400, "The body is not valid JSON; send one JSON object.")
        if not where and "json" not in request.headers.get("content-type", ""):
            sentence = "The body must be sent as JSON: add the header 'Content-Type: application/json'."
            return error_response(request.scope, 400, sentence)
        message = first["msg"].removeprefix("Value error, ")
        return error_response(request.scope, 400, f"{where}: {message}" if where else message, param=where or None)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code in (404, 405):
            served = ", ".join(sorted(_endpoints(app.routes)))
            message = f"{request.method} {request.url.path} is not served here; this server has {served}."
        elif isinstance(error.__cause__, ValueError | RecursionError):
            message = _unreadable(error.__cause__)
        return error_response(request.scope, error.status_code, message, headers=error.headers)

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("request failed", exc_info=error)
        return error_response(request.scope, 500, FAILED)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(GLM5Error, user_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _unreadable(error: ValueError | RecursionError) -> str:
    """What the parser refuses besides wrong syntax."""
    if isinstance(error, UnicodeDecodeError):
        return f"The body is not valid UTF-8 (byte {error.start}); send JSON that is encoded as UTF-8."
    if isinstance(error, RecursionError):
        return "The body is nested too deep; send JSON with fewer lists and objects inside each other."
    digits = sys.get_int_max_str_digits()
    return f"The body holds a whole number of more than {digits} digits, which is not read; send a shorter one."


def _retry(status: int) -> dict[str, str] | None:
    """When to come back, for those who may."""
    return {"Retry-After": "1"} if status in (429, 503) else None


def _endpoints(routes: Iterable[Any]) -> Iterable[str]:
    """`POST /v1/completions` and so on: what is for programs, without the page's files."""
    for route in routes:
        if getattr(route, "include_in_schema", False):
            yield from (f"{method} {route.path}" for method in route.methods - {"HEAD"})
