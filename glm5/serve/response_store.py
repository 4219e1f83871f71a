"""Responses that can be continued by `previous_response_id`: the latest ones, in this process's memory only.

They are kept with `store: true`, which is OpenAI's default, until newer ones need the room or the server ends; nothing
is written to disk.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from glm5.serve.errors import ApiError

MOST_RESPONSES = 1024
MOST_BYTES = 64 * 2**20


GONE = "it was deleted, it was never stored (store: false), or the server, which keeps the latest, has dropped it"


@dataclass(frozen=True)
class StoredResponse:
    """One response: the object, and the conversation up to its end, without the instructions."""

    body: dict[str, Any]
    messages: list[dict[str, Any]]
    size: int


class ResponseStore:
    """The latest responses. Thread-safe: a large one is put here by a worker thread."""

    def __init__(self, most: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.bytes = 0
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, body: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Keeps a response; the oldest make room."""
        size = len(json.dumps([body, messages], ensure_ascii=False))
        with self._lock:
            self._kept[body["id"]] = StoredResponse(body, messages, size)
            self.bytes += size
            while self._kept and (len(self._kept) > self.most or self.bytes > self.most_bytes):
                self.bytes -= self._kept.popitem(last=False)[1].size

    def get(self, name: str) -> StoredResponse:
        """A response by its id. Raises `ApiError` (404)."""
        found = self._kept.get(name)
        if found is None:
            raise ApiError(404, f"There is no response {name!r}: {GONE}. Ask anew with POST /v1/responses.")
        return found

    def earlier(self, name: str) -> StoredResponse:
        """The one that a request goes on from. Raises `ApiError` (400, as at OpenAI)."""
        found = self._kept.get(name)
        if found is None:
            raise ApiError(
                400, f"There is no response {name!r} to go on from: {GONE}. Send the whole conversation as input.",
                param="previous_response_id", code="previous_response_not_found",
            )  # fmt: skip
        return found

    def delete(self, name: str) -> None:
        """Forgets a response, or 404."""
        self.get(name)
        with self._lock:
            found = self._kept.pop(name, None)
            self.bytes -= found.size if found else 0
