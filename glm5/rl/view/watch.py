"""Between a run and its live view: keeps the newest snapshot, and does not draw more often than an eye can follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from glm5.rl.fleet import EngineState
from glm5.rl.view.snapshot import Snapshot

EVERY = 0.5
"""Seconds between two glances that are drawn."""


class Watch:
    """`show`: of a `LiveView`, or any function of a snapshot."""

    def __init__(self, show: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        self._show, self._snapshot = show, snapshot
        self._due = 0.0

    def learnt(self, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """A step was taken: its lines of `metrics` and `speed`."""
        self._snapshot = replace(self._snapshot.after(metrics, speed), note="")
        self._show(self._snapshot)

    def glance(self, running: int, queue: int, engines: Callable[[], Sequence[EngineState]]) -> None:
        """Between two steps; most calls draw nothing."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + EVERY
        self._snapshot = replace(self._snapshot, running=running, queue=queue, engines=tuple(engines()))
        self._show(self._snapshot)

    def note(self, text: str) -> None:
        """Something that a person should know; it stays until the next step."""
        if text != self._snapshot.note:
            self._snapshot = replace(self._snapshot, note=text)
            self._show(self._snapshot)
