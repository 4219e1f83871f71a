"""The gateway: a server whose sessions are recorded, for agent programs that are to be learnt from unchanged.

A program names its session by the header `X-Session-ID`, or by its base URL: what is asked for below `/s/SESSION` is
asked for in that session. Beside the APIs of `glm5.serve`, with the same key:

| call | |
|---|---|
| `POST /rl/sessions` | opens a session: `session`, `group`, `task`, all of them optional |
| `GET /rl/sessions/ID` | what is known of it |
| `POST /rl/sessions/ID/reward` | `value`, `reason`, `final` (default true) |
| `POST /rl/sessions/ID/abandon` | gives it up: no reward, nothing learnt |
| `DELETE /rl/sessions/ID` | deletes all that is kept of it |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from starlette.types import ASGIApp, Receive, Scope, Send

from glm5.engine import SamplingDefaults
from glm5.rl.gateway.session import Session
from glm5.rl.gateway.sessions import Sessions
from glm5.serve import Limits, create_app
from glm5.serve.fields import RequestBody
from glm5.serve.generation import Source

BELOW = re.compile(r"/s/([^/]+)(/.*)")


class OpenRequest(RequestBody):
    """The body that opens a session."""

    unread = frozenset()
    session: str | None = None
    group: str | None = Field(default=None, min_length=1)
    """Sessions of one group do the same task: their rewards are compared with each other."""
    task: str | None = None


class RewardRequest(RequestBody):
    """The body that gives a reward."""

    unread = frozenset()
    value: float
    reason: str = ""
    final: bool = True


class AbandonRequest(RequestBody):
    """The body that gives a session up."""

    unread = frozenset()
    reason: str = "It was given up by its owner."


def create_gateway(
    source: Source,
    sessions: Sessions,
    *,
    model_name: str = "glm5",
    aliases: Sequence[str] = (),
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: Iterable[str] | None = None,
    origins: Iterable[str] = (),
    defaults: SamplingDefaults = SamplingDefaults(),
) -> FastAPI:
    """The application of `glm5.serve.create_app`, recording to `sessions`."""
    app = create_app(
        source, model_name=model_name, aliases=aliases, limits=limits, recorder=sessions, api_key=api_key, hosts=hosts,
        origins=origins, defaults=defaults,
    )  # fmt: skip
    install_sessions(app, sessions)
    app.add_middleware(SessionPaths, sessions=sessions)
    return app


def install_sessions(app: FastAPI, sessions: Sessions) -> None:
    """Adds the calls about sessions."""

    def told(session: Session) -> dict[str, Any]:
        return described(session, sessions.under_way(session.id))

    @app.post("/rl/sessions")
    def open_session(body: OpenRequest) -> dict[str, Any]:
        return told(sessions.open(body.session, group=body.group, task=body.task))

    @app.get("/rl/sessions")
    def count() -> dict[str, int]:
        sessions.expire()
        return sessions.counts()

    @app.get("/rl/sessions/{name}")
    def one(name: str) -> dict[str, Any]:
        return told(sessions.find(name))

    @app.post("/rl/sessions/{name}/reward")
    def reward(name: str, body: RewardRequest) -> dict[str, Any]:
        return told(sessions.reward(name, body.value, body.reason, final=body.final))

    @app.post("/rl/sessions/{name}/abandon")
    def abandon(name: str, body: AbandonRequest) -> dict[str, Any]:
        sessions.abandon(name, body.reason)
        return told(sessions.find(name))

    @app.delete("/rl/sessions/{name}")
    def forget(name: str) -> dict[str, Any]:
        sessions.forget(name)
        return {"session": name, "deleted": True}


def described(session: Session, under_way: int) -> dict[str, Any]:
    """A session for its owner, with the number of its requests that are under way. The base URLs are to be put behind
    the server's own address."""
    reward = session.reward
    return {
        "session": session.id,
        "group": session.group,
        "task": session.task,
        "state": session.state,
        "reward": None if reward is None else {"value": reward.value, "reason": reward.reason},
        "turns": session.num_turns,
        "sampled_tokens": session.sampled_tokens,
        "learnable_tokens": session.learnable_tokens,
        "under_way": under_way,
        "note": note_of(session, under_way),
        "openai_base_url": f"/s/{session.id}/v1",
        "anthropic_base_url": f"/s/{session.id}",
    }


def note_of(session: Session, under_way: int) -> str:
    """How much of a session can be learnt from, in a sentence, and that there may be more to come."""
    requests = "1 request is" if under_way == 1 else f"{under_way} requests are"
    coming = f" {requests} under way; what is answered is part of the session, and counts too." if under_way else ""
    if not session.num_turns:
        return f"No answer is recorded here{coming and ' yet'}; without one, its reward counts for nothing.{coming}"
    said = f"{session.learnable_tokens} of {session.sampled_tokens} tokens can be learnt from"
    if session.learnable_tokens:
        return f"{said}.{coming}"
    return (
        f"{said}, so its reward counts for nothing: answers are learnt from when they were sampled at temperature 1 "
        f"with nothing cut off (top_p 1, no penalties, no response_format), and came to their end.{coming}"
    )


class SessionPaths:
    """ASGI layer: `/s/SESSION/REST` becomes `/REST` with the header `X-Session-ID: SESSION`. The session is told of the
    beginning and the end of its requests."""

    def __init__(self, app: ASGIApp, sessions: Sessions) -> None:
        self.app, self.sessions = app, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rewrites one request."""
        found = BELOW.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if found:
            session, path = found.groups()
            headers = [(name, value) for name, value in scope["headers"] if name != b"x-session-id"]
            headers.append((b"x-session-id", session.encode("utf-8", "replace")))
            scope = {**scope, "path": path, "raw_path": path.encode("utf-8", "replace"), "headers": headers}
        named = [value for name, value in scope.get("headers", ()) if name == b"x-session-id"]
        if not named or scope["path"].startswith("/rl/"):
            return await self.app(scope, receive, send)
        with self.sessions.request(named[0].decode("latin-1")):
            await self.app(scope, receive, send)
