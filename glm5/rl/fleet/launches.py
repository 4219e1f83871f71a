"""Engines on their way to a seat: each is started, waited for and given the newest weights in a thread of its own.

A fleet that is closed meanwhile leaves nothing behind: engines that are not ready are killed, and those that are just
being started as soon as they are.
"""

from __future__ import annotations

import threading
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol

from glm5.errors import FleetError, GLM5Error
from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.member import Events, Executor, Member
from glm5.rl.fleet.seat import Seat

END_SECONDS = 2.0
"""For threads to end when the fleet is closed. One whose process is just being forked waits for that, and kills it;
where this program has ended before, the process finds nobody and ends itself."""


class Seats(Events, Protocol):
    """The fleet's side."""

    def take(self, seat: Seat, member: Member, has: int) -> int | None:
        """Seats an engine with weights of version `has`; or gives the newer version that it must take before."""

    def failed(self, seat: Seat, reason: str, *, final: bool) -> None:
        """It did not come up. final: no other one will."""


class Launches:
    """The launches of one fleet. changed: the fleet's lock, notified when something ends."""

    def __init__(self, executor: Executor, config: FleetConfig, changed: threading.Condition) -> None:
        self._executor, self._config, self._changed = executor, config, changed
        self._coming: set[Member] = set()
        """Engines that are not seated yet."""
        self._threads = 0
        self._ended = False

    def begin(self, seat: Seat, seats: Seats, delay: float = 0.0) -> None:
        """Has an engine started for the seat, after so many seconds."""
        with self._changed:
            self._threads += 1
        thread = threading.Thread(
            target=self._work, args=(seat, seats, delay), name=f"glm5-seat-{seat.name}", daemon=True
        )  # fmt: skip
        thread.start()

    def end(self) -> None:
        """No engine comes any more; those on their way are killed."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            coming = list(self._coming)
        for member in coming:
            member.close(kill=True)

    def wait(self) -> None:
        """Gives the threads a moment to end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._threads, END_SECONDS)

    def _work(self, seat: Seat, seats: Seats, delay: float) -> None:
        try:
            with self._changed:
                if self._changed.wait_for(lambda: self._ended, delay):
                    return
            self._launch(seat, seats)
        finally:
            with self._changed:
                self._threads -= 1
                self._changed.notify_all()

    def _launch(self, seat: Seat, seats: Seats) -> None:
        """Starts an engine and seats it with the newest weights."""
        member = None
        try:
            member = self._executor.launch(seat.name, seats, self._config)
            with self._changed:
                if self._ended:
                    raise FleetError("the fleet was closed")
                self._coming.add(member)
            member.wait()
            has = member.facts.version
            while (wanted := seats.take(seat, member, has)) is not None:
                has = member.update(wanted).result(self._config.update_seconds)
        except Exception as error:
            if member is not None:
                member.close(kill=True)
            final = isinstance(error, GLM5Error) and not isinstance(error, FleetError)
            timeout = isinstance(error, FutureTimeout)
            seats.failed(seat, "it took no weights in time" if timeout else str(error) or repr(error), final=final)
        finally:
            with self._changed:
                if member is not None:
                    self._coming.discard(member)
