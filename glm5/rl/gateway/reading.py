"""From closed sessions to groups of rollouts, in the order in which the sessions were closed.

Sessions that name one group are compared with each other, `group_size` at a time. Sessions of real use name none; they
are put together in the order of their closing, so that their common mean is the baseline: an estimate of what the
model is worth to its users at that time, with more noise than a task's own. Those of them that nobody has rewarded, or
that hold nothing to learn from, are left out: most real use may be like that, and a group of theirs would be given up.

Places in groups are numbered by the order of closing, so the same directory always gives the same tickets. Sessions
that a run has had already are not given again, whether their files are still there or not.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm5.errors import RunError
from glm5.rl.gateway.session import ENVIRONMENT, Session, read_session
from glm5.rl.records import Rollout, Ticket

log = logging.getLogger("glm5.rl")
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


@dataclass(frozen=True, slots=True)
class Ready:
    """Sessions that are to be learnt from together."""

    sessions: tuple[tuple[Session, Ticket], ...]
    torn: Ticket | None = None
    """The group in which the run has others of theirs already: these are the rest of it."""

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """Theirs, made each time: turns of long sessions are large, and there may be many sessions."""
        return tuple(session.rollout(ticket) for session, ticket in self.sessions)


@dataclass
class FinishedSessions:
    """The closed sessions of a directory, as a stream that grows."""

    directory: Path
    group_size: int
    weights: str | None = None
    """Only sessions of these are learnt from; None: of any."""
    had: Mapping[str, Ticket] = field(default_factory=dict)
    """Sessions that the run has had before, with their places."""
    others: list[OtherWeights] = field(default_factory=list)
    """Those that were left out."""
    damaged: list[str] = field(default_factory=list)
    """Files that could not be read."""
    unlearnable: int = 0
    """Those with a reward and no token that can be learnt from. In a group of a name they take their places, and are
    dropped there."""
    unrewarded: int = 0
    """Those without a group and a reward."""

    def __post_init__(self) -> None:
        self._seen: set[str] = set()
        self._looked: int | None = None
        """When the directory had last changed at the last look, if that was long enough before it."""
        self._waiting: dict[str, list[tuple[Session, Ticket]]] = {}
        self._numbers: dict[str, int] = {}
        self._attempts: dict[str, int] = {}
        sizes = Counter(ticket.group for ticket in self.had.values())
        self._missing = {group: self.group_size - size for group, size in sizes.items() if size < self.group_size}
        """Places of groups that the run has had a part of."""
        self._torn: dict[str, list[Ticket]] = {}
        """Those groups, by the name that their sessions have for them; the rest of the first is what comes first."""

    @property
    def waiting(self) -> int:
        """Sessions whose group is not complete."""
        return sum(map(len, self._waiting.values()))

    @property
    def left_out(self) -> str:
        """Which closed sessions are not learnt from, in numbers and words; empty when all are."""
        old = sum(len(other.weights) == OLD_NAMES for other in self.others)
        found = {
            "hold no token that can be learnt from (sampled at temperature 1 with nothing cut off)": self.unlearnable,
            "name no group and have no reward": self.unrewarded,
            "were recorded with other weights than the parent's": len(self.others) - old,
            "were recorded by an earlier version, which could not tell weights of one shape apart (record anew)": old,
            "cannot be read": len(self.damaged),
        }
        return ", ".join(f"{count} {words}" for words, count in found.items() if count)

    def poll(self) -> Iterator[Ready]:
        """The groups that have become complete since the last call."""
        sessions = [session for name in self._new() if (session := self._read(name)) is not None]
        for session in sessions:
            self._note_torn(session)
        for session in sessions:
            if session.id not in self.had and (ready := self._add(session)):
                yield ready

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

    def _read(self, name: str) -> Session | None:
        """A session that the run has had or may learn from. A file that cannot be read is named and left out."""
        self._seen.add(name)
        path = self.directory / "finished" / name
        try:
            session = read_session(path)
            if session.state == "open":
                raise RunError(f"{path} ends before its session was closed.")
        except RunError as error:
            had = path.stem.partition("-")[2] in self.had  # then nothing is lost
            if path.exists() and not had:  # else it was deleted just now
                self.damaged.append(name)
                log.warning("A recorded session is left out: %s", error)
            return None
        if session.id not in self.had and self.weights is not None and session.weights != self.weights:
            self.others.append(OtherWeights(session.id, session.weights))
            return None
        return session

    def _note_torn(self, session: Session) -> None:
        """Which group's rest the next sessions of this one's group are."""
        had = self.had.get(session.id)
        torn = self._torn.setdefault(session.group or UNGROUPED, [])
        if had is not None and had.group in self._missing and had.group not in torn:
            torn.append(had.group)

    def _add(self, session: Session) -> Ready | None:
        """Gives the session its place, if it has one, and the group if it is complete."""
        rewarded, learnable = session.reward is not None, session.learnable_tokens > 0
        self.unlearnable += rewarded and not learnable
        self.unrewarded += not rewarded and not session.group
        if not session.group and not (rewarded and learnable):
            return None
        name = session.group or UNGROUPED
        number = self._numbers.setdefault(name, len(self._numbers))
        members = self._waiting.setdefault(name, [])
        ticket = Ticket(ENVIRONMENT, number, self._attempts.setdefault(name, 0), len(members))
        members.append((session, ticket))
        torn = next(iter(self._torn[name]), None)
        if len(members) < (self.group_size if torn is None else self._missing[torn]):
            return None
        self._attempts[name] += 1
        self._torn[name] = self._torn[name][1:]
        return Ready(tuple(self._waiting.pop(name)), torn)
