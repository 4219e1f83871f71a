"""Errors in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from glm5.errors import GLM5Error, InputError, TextError

log = logging.getLogger("glm5.serve")


class ApiError(GLM5Error):
    """A request that is answered with an error: an HTTP status, a sentence, and the field that is at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def error_status(error: GLM5Error) -> int:
    """400 for what the client sent, 500 for what is wrong with the model."""
    return 400 if isinstance(error, InputError | TextError) else 500


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON body of an error."""
    kinds = {404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install_error_handlers(app: FastAPI) -> None:
    """Every error of the app leaves in this shape, those of the framework too."""

    async def api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        body = error_body(error.status, str(error), param=error.param, code=error.code)
        return JSONResponse(body, error.status, headers)

    async def user_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, GLM5Error)
        status = error_status(error)
        return JSONResponse(error_body(status, str(error)), status)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            return JSONResponse(error_body(400, "The body is not valid JSON; send one JSON object."), 400)
        message = first["msg"].removeprefix("Value error, ")
        return JSONResponse(error_body(400, f"{where}: {message}" if where else message, param=where or None), 400)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code in (404, 405):
            served = "GET /health, GET /v1/models, POST /v1/chat/completions"
            message = f"{request.method} {request.url.path} is not served here; this server has {served}."
        return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        log.error("request failed", exc_info=error)
        return JSONResponse(error_body(500, "The server failed on this request; its log has the reason."), 500)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(GLM5Error, user_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)
