"""Environments behind an OpenEnv server: one WebSocket session for each episode.

    environment = OpenEnv("echo", "http://127.0.0.1:8000", action=lambda message: {"message": message["content"]})

The protocol of OpenEnv 0.10 (BSD-3): text frames {"type": "reset" | "step" | "close", "data": ...}, answered by
{"type": "observation", "data": {"observation": {...}, "reward": ..., "done": ...}} or by {"type": "error", "data":
{"message", "code"}}. The HTTP routes /reset and /step make a new environment for every request, so only the WebSocket
can play an episode. An action that the server's schema refuses is told to the model; every other error is the
environment's.
Needs `websockets` (extra `envs`).
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from glm5.envs.protocol import (
    EnvironmentFailure,
    EpisodeLimits,
    Message,
    Observation,
    Reward,
    Task,
    Tool,
    UniformGroups,
)
from glm5.envs.rewards import reward_of
from glm5.errors import InputError

REFUSED_ACTION = "VALIDATION_ERROR"
FULL = "CAPACITY_REACHED"
"""Of a server all of whose sessions are taken; one is free again some time later."""
LONGEST_FRAME = 16 << 20


def said(message: Message) -> dict[str, Any]:
    """The action of a server that takes a text under "message"."""
    return {"message": message.get("content") or ""}


def as_text(observation: Mapping[str, Any]) -> str:
    """An observation as text: its only text field, or else all of it as JSON."""
    shown = {key: value for key, value in observation.items() if key != "metadata" and value is not None}
    texts = [value for value in shown.values() if isinstance(value, str)]
    return texts[0] if len(texts) == 1 else json.dumps(shown, ensure_ascii=False)


@dataclass(frozen=True)
class OpenEnv:
    """`name`: must change with what the server does. `url`: of the server, http(s) or ws(s)."""

    name: str
    url: str
    instructions: str = ""
    action: Callable[[Message], Mapping[str, Any]] = said
    """What is sent for a message of the model; a ValueError, LookupError or TypeError is told to the model."""
    shown: Callable[[Mapping[str, Any]], str] = as_text
    connect_seconds: float = 10.0
    limits: EpisodeLimits = field(default_factory=lambda: EpisodeLimits(turns=32, step_seconds=60.0))
    uniform_groups: UniformGroups = "drop"

    def __post_init__(self) -> None:
        if self.url.split("://")[0] not in ("http", "https", "ws", "wss"):
            raise InputError(f"{self.url!r} is no address of an OpenEnv server; give http://HOST:PORT.")
        if importlib.util.find_spec("websockets") is None:
            raise InputError("OpenEnv servers need the package websockets: pip install 'glm5[envs]'.")

    def task(self, seed: int, index: int) -> Task:
        """The task is the seed of the reset; its messages come with the episode."""
        messages = ({"role": "user", "content": self.instructions},) if self.instructions else ()
        return Task(f"{self.name}/{seed}/{index}", messages, answer="", category="all")

    def episode(self, task: Task) -> OpenEnvEpisode:
        """A session of its own, opened at the reset."""
        return OpenEnvEpisode(self, task)


class OpenEnvEpisode:
    """One session of the server."""

    tools: tuple[Tool, ...] = ()

    def __init__(self, environment: OpenEnv, task: Task) -> None:
        self._environment, self._task = environment, task
        self._socket: Any = None
        self._total = 0.0

    async def reset(self) -> Observation:
        """Connects; the instructions and the first observation in one message."""
        await self._connect()
        digest = hashlib.sha256(self._task.id.encode()).digest()
        reply = await self._ask("reset", {"seed": int.from_bytes(digest[:4], "little") >> 1})
        shown = self._environment.shown(reply["observation"])
        text = "\n\n".join(filter(None, (self._environment.instructions, shown)))
        return Observation(({"role": "user", "content": text},))

    async def step(self, message: Message) -> Observation:
        """One action."""
        try:
            action = dict(self._environment.action(message))
            reply = await self._ask("step", action)
        except (ValueError, LookupError, TypeError) as error:
            return Observation(({"role": "user", "content": f"That is no valid action: {error}"},))
        self._total += float(reply.get("reward") or 0.0)
        if reply.get("done"):
            return Observation(done=True)
        return Observation(({"role": "user", "content": self._environment.shown(reply["observation"])},))

    async def score(self) -> Reward:
        """The sum of the rewards so far."""
        return reward_of(self._total, self._task)

    async def close(self) -> None:
        """Ends the session."""
        socket, self._socket = self._socket, None
        if socket is not None:
            try:
                async with asyncio.timeout(5):
                    await socket.send(json.dumps({"type": "close"}))
                    await socket.close()
            except Exception:
                pass  # the session ends with its connection

    async def _connect(self) -> None:
        from websockets.asyncio.client import connect

        url = self._environment.url.rstrip("/").replace("http", "ws", 1) + "/ws"
        wait = self._environment.connect_seconds
        try:
            self._socket = await connect(url, open_timeout=wait, max_size=LONGEST_FRAME, proxy=None)
        except (OSError, TimeoutError, ValueError) as error:
            raise EnvironmentFailure(f"{url} cannot be reached: {error}", "unreachable") from error
        except Exception as error:  # an answer that is no WebSocket's
            raise EnvironmentFailure(f"{url} refused the session: {error}", "unreachable") from error

    async def _ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """The data of the server's observation; ValueError for an action that its schema refuses."""
        from websockets.exceptions import ConnectionClosed

        try:
            try:
                await self._socket.send(json.dumps({"type": kind, "data": data}))
            except ConnectionClosed:
                pass  # a server that refuses a session says why before it closes
            reply = json.loads(await self._socket.recv())
        except Exception as error:
            raise EnvironmentFailure(f"the session of {self._task.id} broke: {error!r}", "unreachable") from error
        if reply.get("type") == "error":
            code, text = reply["data"].get("code"), reply["data"].get("message")
            if kind == "step" and code == REFUSED_ACTION:
                raise ValueError("; ".join(str(one.get("msg")) for one in reply["data"].get("errors", [])) or text)
            said = f"the server of {self._environment.name} says: {text} ({code})"
            raise EnvironmentFailure(said, "unreachable" if code == FULL else "crash")
        if reply.get("type") != "observation" or "observation" not in reply.get("data", {}):
            raise EnvironmentFailure(f"the server of {self._environment.name} gave no observation", "crash")
        found: dict[str, Any] = reply["data"]
        return found
