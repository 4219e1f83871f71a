"""`SupervisedFleet`: engines that may die, behind streams that do not.

Every engine has a seat. Whoever sits there is watched; when it dies, says nothing, or computes nothing while it has
work, another one is started in its place with the newest weights. Its requests go on elsewhere at once, after the
tokens that they have (`Engine.stream(said=)`), so their readers see nothing of it: in strict mode not a bit changes.

Limits keep a fault from going round. An engine that fails more than `max_restarts` times within `restart_window` gives
its seat up, and when no seat is left every stream ends with an error. A request that may have killed its engine is
tried again alone (`suspects.py`); after `max_moves` it ends with an error. Neither before `outage_seconds`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from glm5.engine import SamplingParams, TokenDelta
from glm5.engine.admission import admit, check_queueing
from glm5.engine.sequence import fresh_seed
from glm5.errors import FleetError, GLM5Error, RequestFailed
from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.job import Delivery, FleetStream, Job
from glm5.rl.fleet.launches import Launches
from glm5.rl.fleet.member import Executor, Facts, Member
from glm5.rl.fleet.places import Places
from glm5.rl.fleet.protocol import FleetStats
from glm5.rl.fleet.seat import Seat
from glm5.rl.fleet.snapshots import Snapshots
from glm5.rl.fleet.suspects import Suspects
from glm5.text import Tokenizer
from glm5.threads import in_thread

log = logging.getLogger("glm5.fleet")
WATCH_SECONDS = 0.2
LAG_SECONDS = 1.0
"""By which a busy machine delays the watch; more, and this whole program stood still."""


class SupervisedFleet:
    """See `glm5.rl.fleet.Fleet`. `size` engines of one executor, all with the same model and this tokenizer."""

    def __init__(
        self, executor: Executor, size: int, *, tokenizer: Tokenizer | None = None, config: FleetConfig | None = None,
    ) -> None:  # fmt: skip
        if size < 1:
            raise FleetError(f"A fleet has at least one engine; its size is {size}.")
        self.tokenizer, self.config = tokenizer, config or FleetConfig()
        self._executor = executor
        self._seats = [Seat(str(number)) for number in range(size)]
        self._places = Places(self._seats)
        self._jobs: dict[int, Job] = {}
        self._waiting: list[Job] = []
        """Jobs without an engine, because none that may take them is there at the moment."""
        self._suspects = Suspects()
        self._numbers = itertools.count(1)
        self._dropped: deque[Job] = deque()
        """Jobs whose streams were lost, perhaps to the garbage collector, which must take no lock."""
        self._facts: Facts | None = None
        self._version = -1
        """The newest weights that all engines have."""
        self._moved = 0
        self._started = self._closed = False
        self._changed = threading.Condition(threading.RLock())
        """Guards all of the above."""
        self._launches = Launches(executor, self.config, self._changed)
        self._snapshots, self._publishing = Snapshots(executor), threading.Lock()

    # ---- the source ---------------------------------------------------------------------------------------------
    @property
    def max_model_len(self) -> int:
        """Prompt and new tokens of one sequence."""
        return self._known().limits.max_model_len

    @property
    def version(self) -> int:
        """The newest weights that every engine has."""
        return self._version

    @property
    def failure(self) -> str | None:
        """See `Fleet.failure`: every seat was given up."""
        given_up = [seat.given_up for seat in self._seats if seat.given_up is not None]
        return f"No engine is left: {given_up[-1]}" if len(given_up) == len(self._seats) else None

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, *, session_id: str | None = None,
        priority: int = 0, deadline: float | None = None, said: Sequence[TokenDelta] = (),
    ) -> FleetStream:  # fmt: skip
        """As `Engine.stream`. A structure that cannot be used is refused by the first token, all else at once."""
        params = params or SamplingParams()
        check_queueing(session_id, priority, deadline)
        checked = replace(params, structured_outputs=None) if isinstance(params, SamplingParams) else params
        admit(prompt_ids, checked, self._known().limits, eos_ids=frozenset(), tokenizer=self.tokenizer, grammars=None)
        seeded = params if params.seed is not None else replace(params, seed=fresh_seed())
        until = None if deadline is None else time.monotonic() + deadline
        job = Job(next(self._numbers), tuple(prompt_ids), seeded, session_id, priority, until, list(said))
        with self._changed:
            if self._closed:
                raise FleetError("This fleet is closed; make a new one.")
            self._jobs[job.number] = job
            self._place(job)
        return FleetStream(job, self._abort, self._dropped)

    # ---- life ---------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """See `Fleet.start`. Engines that failed while another is ready are tried on, and join when they are."""
        with self._changed:
            if self._started:
                raise FleetError("This fleet was started before; make a new one.")
            self._started = True
        for seat in self._seats:
            self._launches.begin(seat, self)
        threading.Thread(target=self._watch, name="glm5-fleet", daemon=True).start()
        await in_thread(self._settled)

    async def publish(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """See `Fleet.publish`."""
        await self._snapshots.write(version, state_dict, self._known())
        await in_thread(self._hand_out, version)

    async def hand_over(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """See `Fleet.hand_over`."""
        if self._executor.outlived and version > self._version:
            try:
                if version > await self._snapshots.settled():
                    await self._snapshots.write(version, state_dict, self._known())
                await in_thread(self._hand_out, version)
                if away := [seat.name for seat in self._seats if seat.version < version]:
                    log.warning("Engines %s are away and lack the last weights, version %d.", ", ".join(away), version)
            except (GLM5Error, OSError, asyncio.CancelledError) as error:
                log.warning("Not all servers have the last weights, version %d: %s", version, str(error) or "Ctrl-C")

    async def close(self) -> None:
        """Ends all requests and engines."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for job in self._jobs.values():
                job.mailbox.finish()
            self._jobs.clear()
            members = [seat.member for seat in self._seats if seat.member is not None]
            for seat in self._seats:
                seat.member = None
            self._changed.notify_all()
        closing = [in_thread(member.close, kill=False) for member in members]
        await asyncio.gather(in_thread(self._launches.end), *closing)
        await self._snapshots.close()
        await in_thread(self._launches.wait)

    async def ready(self) -> bool:
        """Whether an engine is there; without one, requests wait."""
        return any(seat.member is not None for seat in self._seats)

    def stats(self) -> FleetStats:
        """What each engine does."""
        with self._changed:
            waiting = sum(job.member is None and self._places.must_wait(job) for job in self._jobs.values())
            return FleetStats(tuple(seat.state() for seat in self._seats), self._moved, waiting)

    # ---- what engines say ---------------------------------------------------------------------------------------
    def delivered(self, member: Member, deliveries: list[Delivery]) -> None:
        """Tokens for their jobs, unless these have gone elsewhere."""
        with self._changed:
            for delivery in deliveries:
                job = self._jobs.get(delivery.number)
                if job is not None and job.member is member:
                    if len(job.said) == job.begun_with:
                        self._places.taken(job)
                    job.take(delivery)
                    self._acquit(job)

    def ended(self, member: Member, number: int, error: BaseException | None) -> None:
        """A job's end, but that one at which only this engine fails is tried by the others."""
        with self._changed:
            job = self._jobs.get(number)
            if job is None or job.member is not member:
                return
            if not isinstance(error, RequestFailed):
                return self._finish(job, error)
            self._places.refused(job, member, error)
            self._place(job)
            self._moved += number in self._jobs
            self._acquit(job)

    def lost(self, member: Member, reason: str) -> None:
        """Somebody died: the jobs go elsewhere, and the seat is filled again."""
        with self._changed:
            seat = self._places.seat_of(member)
            if seat is None or self._closed:
                return
            log.warning("engine %s is replaced: %s", seat.name, reason)
            self._places.empty(seat)
            threading.Thread(target=partial(member.close, kill=True), daemon=True).start()
            orphans = [job for job in self._jobs.values() if job.member is member]
            self.failed(seat, reason, final=False)
            self._moved += len(orphans)
            free = self._suspects.judge(orphans)
            for job in orphans:
                if job.hopeless(self.config):
                    why = f"{job.moves} engines died under one request ({reason}); look at it."
                    self._finish(job, RequestFailed(why))
                elif job in free:
                    self._place(job)
            self._try_next()

    # ---- jobs (all under the lock) ------------------------------------------------------------------------------
    def _place(self, job: Job) -> None:
        """Begins a job on the engine that its session belongs to, or lets it wait for one."""
        error = self._places.last_refusal(job) if self.failure is None else FleetError(self.failure)
        if error is not None:
            self._finish(job, error)
        elif not self._places.begin(job, self._jobs.values()):
            self._waiting.append(job)

    def _place_waiting(self) -> None:
        """Places the jobs that wait, after the engines have changed."""
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            if job.number in self._jobs:
                self._place(job)
        self._try_next()

    def _try_next(self) -> None:
        """Places the next suspect when none is being tried; one that cannot be placed any more makes room at once."""
        while (job := self._suspects.next(self._jobs, self._places.must_wait)) is not None:
            self._place(job)
            self._suspects.placed(job)

    def _acquit(self, job: Job) -> None:
        if self._suspects.acquit(job):
            self._try_next()

    def _finish(self, job: Job, error: BaseException | None) -> None:
        self._jobs.pop(job.number, None)
        job.mailbox.finish(error)
        self._acquit(job)

    def _abort(self, job: Job) -> None:
        with self._changed:
            job.mailbox.abandon()
            if self._jobs.pop(job.number, None) is not None and job.member is not None:
                job.member.abort(job.number)
            self._acquit(job)

    # ---- seats --------------------------------------------------------------------------------------------------
    def take(self, seat: Seat, member: Member, has: int) -> int | None:
        """Seats an engine with weights of version `has`; or gives the newer version that it must take before."""
        with self._changed:
            if self._closed:
                raise FleetError("the fleet was closed")
            if has < self._snapshots.newest:
                return self._snapshots.newest
            self._places.fill(seat, member)
            seat.version, self._facts = has, self._facts or member.facts
            self._version = max(self._version, has)
            self._place_waiting()
            self._changed.notify_all()
            return None

    def failed(self, seat: Seat, reason: str, *, final: bool) -> None:
        """Another engine is started on the seat, or it is given up."""
        with self._changed:
            if self._closed:
                return
            delay = seat.failed(reason, time.monotonic(), self.config, final=final)
            if delay is not None:
                self._launches.begin(seat, self, delay)
                return
            log.error("%s; its seat is given up", seat.given_up)
            if self.failure is not None:
                for job in list(self._jobs.values()):
                    self._finish(job, FleetError(self.failure))
            self._place_waiting()
            self._changed.notify_all()

    def _settled(self) -> None:
        """Waits until an engine is ready and each other one too, or has failed; or until all are given up."""
        seats = self._seats
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self.failure or (any(s.member for s in seats) and all(s.tried for s in seats))
            )
            if self.failure is not None:
                raise FleetError(f"No engine could be started: {self._seats[-1].given_up}")
            for seat in () if self._closed else seats:
                if not (seat.member or seat.given_up):
                    log.warning("engine %s is not there yet and tried again: %s", seat.name, seat.failure)

    def _known(self) -> Facts:
        if self._facts is None:
            raise FleetError("The fleet has not been started, or no engine came up; await its start() first.")
        return self._facts

    # ---- weights ------------------------------------------------------------------------------------------------
    def _hand_out(self, version: int) -> None:
        """Every engine that lives takes the newest snapshot; one that does not is replaced."""
        with self._publishing:
            with self._changed:
                if self.failure is not None:
                    raise FleetError(self.failure)
                asked = [(s, s.member, s.member.update(version)) for s in self._seats if s.member is not None]
            until = time.monotonic() + self.config.update_seconds
            for seat, member, future in asked:
                try:
                    has = future.result(max(until - time.monotonic(), 0.0))
                except Exception as error:
                    refused = str(error) or f"no answer within {self.config.update_seconds:g} s"
                    self.lost(member, f"it did not take weights version {version}: {refused}")
                else:
                    with self._changed:
                        seat.version = has if seat.member is member else seat.version
            with self._changed:
                if all(seat.given_up for seat in self._seats):  # any other takes it when it is seated
                    raise FleetError(f"No engine took weights version {version}: {self._seats[-1].given_up}")
                self._version = max(self._version, version)

    # ---- the watch ----------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        """Looks after engines and deadlines until the fleet is closed (in a thread of its own)."""
        looked = time.monotonic()
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, WATCH_SECONDS):
                    return
                while self._dropped:
                    self._abort(self._dropped.popleft())
                now = time.monotonic()
                stood_still = max(0.0, now - looked - LAG_SECONDS)  # as by Ctrl-Z: the others were not heard meanwhile
                looked = now
                for job in list(self._jobs.values()):
                    if job.overdue(now):
                        if job.member is not None:
                            job.member.abort(job.number)
                        self._finish(job, None)
                members = [seat.member for seat in self._seats if seat.member is not None]
            for member in members:
                reason = member.trouble(stood_still)
                if reason is not None:
                    self.lost(member, reason)
