"""Which engine a request is tried at: one that has not failed at it, and first those that bear requests of its size.

A server whose memory is full may fail at all but the smallest requests, take those, and be well otherwise. Each larger
one costs time there before it goes on elsewhere, so after some of them the next are tried elsewhere first.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from glm5.rl.fleet.job import Job
from glm5.rl.fleet.member import Member
from glm5.rl.fleet.routing import Router
from glm5.rl.fleet.seat import AVOIDED_SECONDS, Seat

log = logging.getLogger("glm5.fleet")


class Places:
    """The seats of a fleet, and who sits there (under the fleet's lock)."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self._seats, self._router = seats, Router()

    def fill(self, seat: Seat, member: Member) -> None:
        """An engine is ready."""
        seat.member = member
        seat.refused.clear()
        self._router.ring.add(seat.name)

    def empty(self, seat: Seat) -> None:
        """It is gone."""
        seat.member = None
        self._router.ring.remove(seat.name)

    def seat_of(self, member: Member) -> Seat | None:
        """Where an engine sits; None for one that was given up."""
        return next((seat for seat in self._seats if seat.member is member), None)

    def last_refusal(self, job: Job) -> Exception | None:
        """Why nobody takes the job: no seat is left whose engine, now or when it is back, has not failed at it. None
        while there is one."""
        for seat in self._seats:
            if seat.given_up is None and (seat.member is None or seat.member not in job.refused):
                return None
        return next(reversed(job.refused.values()), None)

    def _open(self, job: Job) -> dict[str, Seat]:
        """Whose engines are up and have not failed at the job."""
        return {seat.name: seat for seat in self._seats if seat.member is not None and seat.member not in job.refused}

    def must_wait(self, job: Job) -> bool:
        """Whether all engines that may take the job are away."""
        return not self._open(job) and self.last_refusal(job) is None

    def begin(self, job: Job, jobs: Iterable[Job]) -> bool:
        """Begins the job, beside all others, at the engine that is best for it; False while that is away."""
        up = self._open(job)
        if not up:
            return False
        now, running = time.monotonic(), Counter(other.member for other in jobs)
        loads = {name: running[seat.member] for name, seat in up.items()}
        first = {name: load for name, load in loads.items() if up[name].bears(job.tokens, now)}
        seat = up[self._router.choose(job.session_id, first or loads)]
        assert seat.member is not None
        seat.requests += 1
        job.member = seat.member
        job.member.begin(job.order())
        return True

    def refused(self, job: Job, member: Member, error: Exception) -> None:
        """The job's engine failed at it while it took others."""
        log.warning("%s", error)
        job.member, job.refused[member] = None, error
        seat, now = self.seat_of(member), time.monotonic()
        if seat is None:
            return
        bore = seat.bears(job.tokens, now)
        seat.fails_at(job.tokens, now)
        if bore and not seat.bears(job.tokens, now) and len(self._seats) > 1:
            log.warning(
                "engine %s takes small requests only; those of %d tokens and more are tried elsewhere first, for %g s",
                seat.name, min(seat.refused), AVOIDED_SECONDS,
            )  # fmt: skip

    def taken(self, job: Job) -> None:
        """The job's engine has given its first token."""
        seat = None if job.member is None else self.seat_of(job.member)
        if seat is not None:
            seat.takes(job.tokens)
