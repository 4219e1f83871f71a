"""A stand-in for the server below the page: says prepared answers as events, and notes what it was asked."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from glm5.serve.http import bind
from glm5.serve.page import install_page

CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"town": "Arlo"}'}}


class FakeChat:
    """`answers` maps the last message's text to (thinking, content, tool calls); other texts are said back.

    `odd`: texts whose answer breaks off with an event of this data.
    `hold_after`: an answer waits after so many pieces until this is None again. `holds`: the same for some texts.
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[str, str, list]] = {}
        self.odd: dict[str, str] = {}
        self.asked: list[dict] = []
        self.key: str | None = None
        self.hold_after: int | None = None
        self.holds: dict[str, int] = {}
        self.failure: tuple[int, str] | None = None
        self.app = FastAPI()
        install_page(self.app)
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.complete)

    def _refusal(self, request: Request) -> JSONResponse | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "The key is wrong or missing."}}, 401)
        if self.failure is not None:
            return JSONResponse({"error": {"message": self.failure[1]}}, self.failure[0])
        return None

    def models(self, request: Request) -> JSONResponse:
        body = {"object": "list", "data": [{"id": "fake", "object": "model", "max_model_len": 202_752}]}
        return (request and self._refusal(request)) or JSONResponse(body)

    async def complete(self, request: Request):
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        body = await request.json()
        self.asked.append(body)
        text = body["messages"][-1]["content"]
        default = ("", f"You said: {text}", [])
        return StreamingResponse(self._events(text, *self.answers.get(text, default)), media_type="text/event-stream")

    async def _events(self, text: str, thinking: str, content: str, calls: list) -> AsyncIterator[str]:
        deltas = [{"role": "assistant", "content": ""}]
        deltas += [{"reasoning_content": piece} for piece in _pieces(thinking)]
        deltas += [{"content": piece} for piece in _pieces(content)]
        deltas += [{"tool_calls": [{"index": i, **call}]} for i, call in enumerate(calls)]
        for number, delta in enumerate(deltas):
            while (hold := self.holds.get(text, self.hold_after)) is not None and number > hold:
                await asyncio.sleep(0.01)
            yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            await asyncio.sleep(0.002)
        if text in self.odd:
            yield f"data: {self.odd[text]}\n\n"
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}]})
        usage = {"prompt_tokens": 7, "completion_tokens": len(deltas), "total_tokens": 7 + len(deltas)}
        yield _event({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 3}}})
        yield "data: [DONE]\n\n"


class Running:
    """An app on a free loopback port, in a thread of its own; a context manager that gives the address."""

    def __init__(self, app: FastAPI) -> None:
        self.socket = bind("127.0.0.1", 0)
        self.socket.listen()  # requests wait for the server's first moment
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}/"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
        self.socket.close()


def _pieces(text: str) -> list[str]:
    """Five characters each; of long texts, forty pieces."""
    size = max(5, len(text) // 40)
    return [text[i : i + size] for i in range(0, len(text), size)]


def _event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"
