"""Who may have killed an engine: a request that had got no token there is tried again alone (under the fleet's lock).

Suspects go on one at a time, each after the one before has got a token, and the one that is tried when an engine dies
is blamed alone. So a request that kills every engine takes no other along. One that could only wait for an engine that
is away is left in the queue, and holds up no other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence

from glm5.rl.fleet.job import Job


class Suspects:
    """The queue of suspects, and the one that is being tried."""

    def __init__(self) -> None:
        self._queue: deque[Job] = deque()
        self._tried: Job | None = None
        """Was placed last, sits at an engine, and has got nothing yet."""

    def judge(self, orphans: Sequence[Job]) -> list[Job]:
        """An engine died under these jobs; gives those that are free to go on at once, and keeps the others."""
        tried = self._tried if self._tried in orphans else None
        if tried is not None:
            self._tried = None
        suspected = [job for job in orphans if job.orphaned(blamed=tried is None or job is tried)]
        self._queue += suspected
        return [job for job in orphans if job not in suspected]

    def acquit(self, job: Job) -> bool:
        """The job has got a token, or has ended; True if it was the one that was tried."""
        if job is not self._tried:
            return False
        self._tried = None
        return True

    def next(self, known: Container[int], must_wait: Callable[[Job], bool]) -> Job | None:
        """The next one to place, if nobody is being tried; known: the numbers of the jobs that have not ended."""
        if self._tried is not None:
            return None
        self._queue = deque(job for job in self._queue if job.number in known)
        job = next((job for job in self._queue if not must_wait(job)), None)
        if job is not None:
            self._queue.remove(job)
        return job

    def placed(self, job: Job) -> None:
        """It is being tried if an engine has it; else it has ended."""
        self._tried = job if job.member is not None else None
