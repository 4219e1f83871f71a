"""From closed sessions to groups of rollouts, in the order in which the sessions were closed.

Sessions that name one group are compared with each other, `group_size` at a time. Sessions of real use name none; they
are put together in the order of their closing, so that their common mean is the baseline: an estimate of what the
model is worth to its users at that time, with more noise than a task's own.

Places in groups are numbered by the order of closing, so the same directory always gives the same tickets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from glm5.rl.gateway.session import ENVIRONMENT
from glm5.rl.gateway.sessions import read_session
from glm5.rl.records import Rollout, Ticket

UNGROUPED = ""
OLD_NAMES = 16
"""Digits by which earlier versions named weights: those of a fine-tuned model could have the same as its parent's."""
SETTLED = 2_000_000_000
"""Nanoseconds after which a later change of a directory has a later time of its own, on coarse file systems too."""


@dataclass(frozen=True, slots=True)
class OtherWeights:
    """A session whose versions count from other weights than those that are trained: its tokens have no age here."""

    session_id: str
    weights: str


@dataclass
class FinishedSessions:
    """The closed sessions of a directory, as a stream that grows."""

    directory: Path
    group_size: int
    weights: str | None = None
    """Only sessions of these are learnt from; None: of any."""
    others: list[OtherWeights] = field(default_factory=list)
    """Those that were left out."""

    def __post_init__(self) -> None:
        self._seen: set[str] = set()
        self._looked: int | None = None
        """When the directory had last changed at the last look, if that was long enough before it."""
        self._waiting: dict[str, list[Rollout]] = {}
        self._numbers: dict[str, int] = {}
        self._attempts: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        """Sessions whose group is not complete."""
        return sum(map(len, self._waiting.values()))

    @property
    def left_out(self) -> str:
        """Which closed sessions are not learnt from, in numbers and words; empty when all are."""
        old = sum(len(other.weights) == OLD_NAMES for other in self.others)
        found = {
            "were recorded with other weights than the parent's": len(self.others) - old,
            "were recorded by an earlier version, which could not tell weights of one shape apart (record anew)": old,
        }
        return ", ".join(f"{count} {words}" for words, count in found.items() if count)

    def _new(self) -> list[str]:
        """Names of sessions that were not read yet. A directory in which nothing has changed is not listed again."""
        folder = self.directory / "finished"
        if not folder.is_dir():
            return []
        changed = folder.stat().st_mtime_ns
        if changed == self._looked:
            return []
        self._looked = changed if time.time_ns() - changed > SETTLED else None
        return sorted(name for name in os.listdir(folder) if name.endswith(".jsonl") and name not in self._seen)

    def poll(self) -> Iterator[list[Rollout]]:
        """The groups that have become complete since the last call."""
        for name in self._new():
            self._seen.add(name)
            session = read_session(self.directory / "finished" / name)
            if self.weights is not None and session.weights != self.weights:
                self.others.append(OtherWeights(session.id, session.weights))
                continue
            group = session.group or UNGROUPED
            number = self._numbers.setdefault(group, len(self._numbers))
            members = self._waiting.setdefault(group, [])
            ticket = Ticket(ENVIRONMENT, number, self._attempts.setdefault(group, 0), len(members))
            members.append(session.rollout(ticket))
            if len(members) == self.group_size:
                self._attempts[group] += 1
                yield self._waiting.pop(group)
