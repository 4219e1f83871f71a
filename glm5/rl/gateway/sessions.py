"""All sessions of a gateway: open ones in memory and on disk, finished ones on disk only.

    DIRECTORY/open/SESSION.jsonl                 # grows by one line for each event
    DIRECTORY/finished/00000012-SESSION.jsonl    # moved here when it is closed; numbered in the order of closing

Each file is a journal (`glm5.rl.journal`): a line is with the system before its answer is with the client, so a killed
server loses nothing, and a restarted one goes on with its open sessions. One file is all that is kept of a session:
whoever deletes it has deleted the session.

Whoever learns reads the second folder (`glm5.rl.gateway.reading`), in this process or in another one, now or later.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glm5.envs.protocol import LARGEST_REWARD
from glm5.errors import RunError
from glm5.files import Lock, locked
from glm5.rl.gateway.answers import Message
from glm5.rl.gateway.limits import SessionLimits
from glm5.rl.gateway.session import Session, State, own_distribution, read_session
from glm5.rl.journal import Journal, Record
from glm5.rl.records import Turn
from glm5.serve import ApiError, Generation
from glm5.serve.generation import Sample
from glm5.text import Written

log = logging.getLogger("glm5.rl")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Of sessions, which name files."""
HOUR = 3600.0


@dataclass(frozen=True)
class OpenSession:
    """A session and the file that it is written to."""

    session: Session
    journal: Journal


class Sessions:
    """Also the server's `Recorder`. Methods may be called from any thread; refusals are `ApiError`s."""

    def __init__(
        self,
        directory: Path,
        *,
        weights: str = "",
        limits: SessionLimits | None = None,
        own_sampling: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """weights: which weights the versions count from. own_sampling: the source is an `OwnDistribution`.

        Raises RunError for a directory that another process records to. Open sessions whose files are damaged are put
        aside, into the folder `damaged`.
        """
        self.directory, self.weights, self.limits = directory, weights, limits or SessionLimits()
        self.own_sampling, self.clock = own_sampling, clock
        self._held = _held(directory)
        self._lock = threading.RLock()
        self._closed = {path.stem.partition("-")[2]: path for path in sorted(self.finished.glob("*.jsonl"))}
        self._count = max((int(path.stem.partition("-")[0]) for path in self._closed.values()), default=-1) + 1
        self._open: dict[str, OpenSession] = {}
        for path in sorted(self.opened.glob("*.jsonl")):
            try:
                self._reopen(path)
            except RunError as error:  # one session is lost; the others, and those to come, are not
                log.warning("A recorded session is put aside, to %s: %s", path.rename(self._aside(path.stem)), error)
        self._warned = False
        self._requests: Counter[str] = Counter()
        """That are under way, by session."""

    @property
    def opened(self) -> Path:
        """Where open sessions are."""
        return self.directory / "open"

    @property
    def finished(self) -> Path:
        """Where closed sessions are."""
        return self.directory / "finished"

    # ---- the life of a session ------------------------------------------------------------------------------------
    def open(self, session_id: str | None = None, *, group: str | None = None, task: str | None = None) -> Session:
        """Opens a session, by a name of its own if none is given. Opening it again in the same way changes nothing."""
        name = f"s-{secrets.token_hex(12)}" if session_id is None else session_id
        with self._lock:
            self.expire()
            if name in self._open and self._open[name].session.state == "open":
                session = self._open[name].session
                if (group, task) != (session.group, session.task):
                    raise ApiError(409, f"The session {name!r} is open already, with another group or task.")
                return session
            self._check_new(name)
            session, journal = Session(name), Journal(self.opened / f"{name}.jsonl")
            self._open[name] = OpenSession(session, journal)
            self._write(name, {"kind": "opened", "group": group, "task": task, "weights": self.weights})
            return session

    def reward(self, session_id: str, value: float, reason: str = "", *, final: bool = True) -> Session:
        """Says what the episode was worth. A reward that is not final may be replaced. A final one ends the session: it
        takes no more requests, and is closed when those that are under way (`request`) have come to their ends.

        The same final reward once more is taken as heard already; another one is refused.
        """
        if not abs(value) <= LARGEST_REWARD:
            raise ApiError(400, f"The reward is {value}; it must be a number from -1e6 to 1e6.")
        with self._lock:
            session = self.find(session_id)
            if session.state != "open":
                known = session.reward
                if session.state == "aborted" or known is None:
                    raise ApiError(409, f"The session {session_id!r} was given up: {session.reason}")
                if (known.value, known.reason) != (value, reason):
                    raise ApiError(409, f"The session {session_id!r} has its final reward already: {known.value}.")
                return session
            self._write(session_id, {"kind": "reward", "value": value, "reason": reason, "final": final}, commit=True)
            self._close_finished(session_id)
            return session

    def abandon(self, session_id: str, reason: str) -> None:
        """Gives a session up: it has no reward, and is not learnt from."""
        with self._lock:
            session = self.find(session_id)
            if session.state == "open":
                self._close(session_id, "aborted", reason)
            elif session.state != "aborted":
                raise ApiError(409, f"The session {session_id!r} is finished and cannot be given up.")

    def forget(self, session_id: str) -> None:
        """Deletes all that is known of a session."""
        with self._lock:
            self.find(session_id)
            if session_id in self._open:
                self._open.pop(session_id).journal.close()
                os.unlink(self.opened / f"{session_id}.jsonl")
            else:
                os.unlink(self._closed.pop(session_id))

    def expire(self) -> None:
        """Closes sessions of which nothing was heard for too long: with the reward they have, or as given up."""
        with self._lock:
            oldest = self.clock() - self.limits.idle_hours * HOUR
            quiet = [name for name, entry in self._open.items() if entry.session.touched_at < oldest]
            for name in [name for name in quiet if not self._requests[name]]:  # an answer may take that long
                rewarded = self._open[name].session.reward is not None
                reason = f"Nothing was heard of it for {self.limits.idle_hours:g} hours."
                self._close(name, "finished" if rewarded else "aborted", reason)

    def find(self, session_id: str) -> Session:
        """An open or closed session; raises `ApiError` (404) for an unknown one."""
        with self._lock:
            if session_id in self._open:
                return self._open[session_id].session
            path = self._closed.get(session_id)
        if path is None or not path.exists():
            raise ApiError(404, f"There is no session {session_id!r} here; it begins with its first request.")
        return read_session(path)

    def going_on(self) -> list[Session]:
        """The open sessions."""
        with self._lock:
            return [entry.session for entry in self._open.values()]

    def under_way(self, session_id: str) -> int:
        """Requests of a session that have not come to their end."""
        with self._lock:
            return self._requests[session_id]

    def counts(self) -> dict[str, int]:
        """How many there are."""
        with self._lock:
            aside = len(list((self.directory / "damaged").glob("*.jsonl")))
            return {"open": len(self._open), "closed": len(self._closed), "damaged": aside}

    def close(self) -> None:
        """Closes the files; open sessions stay open for the next process."""
        with self._lock:
            for entry in self._open.values():
                entry.journal.close()
            self._open.clear()
            self._held.close()

    # ---- what the server calls ------------------------------------------------------------------------------------
    @contextmanager
    def request(self, session_id: str) -> Iterator[None]:
        """Around everything that becomes of a request."""
        with self._lock:
            self._requests[session_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests[session_id] -= 1
                self._requests += Counter()  # forgets those without any
                self._close_finished(session_id)

    def begin(self, session_id: str | None) -> None:
        """A request came: it opens its session if it names a new one. Requests without a session are not recorded."""
        if session_id is None:
            return
        with self._lock:
            if session_id not in self._open or self._open[session_id].session.state != "open":
                self.open(session_id)
            if self._open[session_id].session.tokens >= self.limits.max_tokens:
                raise ApiError(
                    400, f"The session {session_id!r} holds {self.limits.max_tokens:,} tokens, which is the limit; "
                    "reward it and begin another."
                )  # fmt: skip

    def written(self, session_id: str, messages: Sequence[Message]) -> Mapping[int, Written]:
        """The answers of this session among the messages."""
        with self._lock:
            entry = self._open.get(session_id)
            return entry.session.answers.written(messages) if entry else {}

    def ended(self, generation: Generation) -> None:
        """Records each answer. One that comes after its session was closed is not part of it."""
        with self._lock:
            entry = self._open.get(generation.session_id or "")
            if entry is None:
                return
            own = self.own_sampling or own_distribution(generation.params)
            own = own and generation.params.structured_outputs is None
            if not own and not self._warned:
                self._warned = True
                log.warning(
                    "An answer of session %s was not sampled at temperature 1 with nothing cut off (top_p, penalties, "
                    "response_format): such tokens are recorded and not learnt from. This is said once; "
                    "GET /rl/sessions/ID says learnable_tokens of each session.", entry.session.id,
                )  # fmt: skip
            for sample in generation.samples:
                if sample.tokens:
                    self._write(entry.session.id, self._turn_event(entry.session, generation, sample, own))

    # ---- parts ----------------------------------------------------------------------------------------------------
    def _turn_event(self, session: Session, generation: Generation, sample: Sample, own: bool) -> Record:
        last = sample.tokens[-1]
        turn = Turn(
            prompt_ids=tuple(sample.prompt_ids),
            output_ids=tuple(token.token_id for token in sample.tokens),
            logprobs=tuple(token.logprob for token in sample.tokens),
            versions=tuple(token.version for token in sample.tokens),
            finish_reason=sample.finish_reason,
            seconds=sample.last_token_at - generation.began,
            cached_tokens=generation.cached_tokens,
        )
        whole = turn.finish_reason != "abort"
        answer = sample.parser.finish() if sample.parser else None
        # The text before a stop string is all that the client knows; the tokens go on to its end.
        spliced = whole and answer is not None and not isinstance(last.stop_reason, str)
        return session.turn_event(
            turn, learnt=own and whole, messages=generation.messages, answer=answer, splice=spliced
        )

    def _check_new(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ApiError(
                400, f"A session is named by up to 128 letters, digits, '.', '_' and '-', not by {name[:40]!r}."
            )
        if name in self._closed or name in self._open:
            raise ApiError(409, f"The session {name!r} is closed; begin another one under a new name.")
        if len(self._open) >= self.limits.max_open:
            raise ApiError(
                429, f"{self.limits.max_open} sessions are open, which is the limit; reward some or give them up."
            )

    def _write(self, name: str, event: Record, *, commit: bool = False) -> None:
        """Writes the event, then believes it."""
        entry = self._open[name]
        event = {**event, "time": round(self.clock(), 3)}
        entry.journal.append(event)
        if commit:
            entry.journal.commit()
        entry.session.apply(event)

    def _close(self, name: str, state: State, reason: str) -> None:
        self._write(name, {"kind": "closed", "state": state, "reason": reason}, commit=True)
        self._file(name)

    def _close_finished(self, name: str) -> None:
        """Closes a session that has its final reward and no request under way."""
        entry = self._open.get(name)
        if entry is not None and entry.session.state == "finished" and not self._requests[name]:
            self._close(name, "finished", entry.session.reason)

    def _aside(self, name: str) -> Path:
        """Where a damaged session is put: its name, numbered where an earlier one has it."""
        folder = self.directory / "damaged"
        folder.mkdir(exist_ok=True)
        names = itertools.chain([name], (f"{name}~{number}" for number in itertools.count(2)))
        return next(path for one in names if not (path := folder / f"{one}.jsonl").exists())

    def _file(self, name: str) -> None:
        """Moves the record of a closed session to the others."""
        self._open.pop(name).journal.close()
        path = self.finished / f"{self._count:08d}-{name}.jsonl"
        os.rename(self.opened / f"{name}.jsonl", path)
        _sync(self.finished)
        self._count += 1
        self._closed[name] = path

    def _reopen(self, path: Path) -> None:
        """Goes on with a session of an earlier process; one that had come to its end is filed now."""
        name, session, journal = path.stem, read_session(path), Journal(path)
        self._open[name] = OpenSession(session, journal)
        if journal.count == 0:  # it died before the first line was whole
            self._open.pop(name).journal.close()
            path.unlink()
        elif session.state != "open":
            self._file(name)


def _held(directory: Path) -> Lock:
    """Makes sure that one process records to the directory, which is made."""
    try:
        for folder in ("open", "finished"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        return locked(directory / "lock", f"Another process records to {directory}; give each its own directory.")
    except OSError as error:
        raise RunError(f"{directory} cannot hold sessions ({error.strerror}); choose another directory.") from None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
