"""The run loop: rollouts are played, the scheduler decides, the learner learns in a thread, engines take new weights.

    environments --episodes--> runner --Rollout--> scheduler --Batch--> learner --weights--> fleet

Everything that is decided is in the journal before it is done (`session.py`), so a run that was killed at any moment
goes on without loss. One coroutine owns all state; the others play rollouts or wait for the learner's thread, and tell
it through a queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from glm5.envs import Environment
from glm5.errors import RunError
from glm5.rl.aids import Aids
from glm5.rl.concurrency import load_of, next_limit
from glm5.rl.config import RLRunConfig
from glm5.rl.episode_task import ended
from glm5.rl.executors import MakeFleet, one_engine
from glm5.rl.fleet import Fleet
from glm5.rl.meter import Meter, Metered
from glm5.rl.outgoing import GLANCE, Outgoing
from glm5.rl.patience import Patience
from glm5.rl.records import Batch, Metrics, Rollout, Ticket, Turn, aborted
from glm5.rl.run_ends import check_end, finish_run, how_to_go_on, open_session, reopened, save_end, started_run
from glm5.rl.runner import play
from glm5.rl.session import Session
from glm5.rl.tasks import TaskSource
from glm5.rl.view.live import LiveView
from glm5.rl.view.watch import Watch, snapshot_of
from glm5.rl.weights.mirror import Mirror, check_unused, claim
from glm5.text import Tokenizer
from glm5.threads import OneThread
from glm5.train import RunDirectory, RunInterrupted
from glm5.train.job import disk_errors
from glm5.train.progress import interrupts
from glm5.train.run_directory import model_of
from glm5.train.watch import watchers

Player = Callable[[Ticket], Awaitable[Rollout]]
"""Makes the rollout of a ticket where this program does not play it: from a session of an outside agent."""


def train_rl(
    config: RLRunConfig,
    environments: Sequence[Environment],
    run_directory: Path,
    *,
    sources: Sequence[TaskSource] | None = None,
    make_fleet: MakeFleet | None = None,
    aids: Aids | None = None,
    held_out: Sequence[Environment] = (),
    publish_to: Path | None = None,
    player: Player | None = None,
    running: Callable[[], int] | None = None,
    meter: Meter | None = None,
    parent: str | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> RunDirectory:
    """Trains the parent's model on the environments; gives the finished run. With `resume`, goes on where it stopped,
    and beyond its end where `steps` are more than it was started for.

    sources: how each environment takes part (share, concurrency, curriculum). make_fleet: where the engines are, by
    default one in this process (`glm5.rl.executors` has others). aids: objects of your own in place of `config.aids`.
    held_out: environments whose reward is measured on the way (`config.held_out`) and never learnt from.
    publish_to: a directory that gets every version too, for `glm5 serve --weights-from`.
    player: who plays the episodes, if not this program; then running: how many there are now, for tickets may wait for
    somebody to begin; and meter: what counts their tokens.
    parent: the hash of the parent's model, if it is known (`directory_sha256`). Ctrl-C finishes the
    running step, saves and raises `RunInterrupted`; after a crash or kill nothing that was finished is sampled again.
    """
    tokenizer = Tokenizer.from_pretrained(model_of(config.parent))
    if publish_to is not None and not resume:
        check_unused(publish_to)
    started = started_run(
        config, environments, run_directory, sources=sources, aids=aids, held_out=held_out, parent=parent, resume=resume
    )  # fmt: skip
    with started as run, disk_errors(run):
        if publish_to is not None:
            claim(publish_to, run)
        if not reopened(run, config, console):
            return run
        session = open_session(
            config, environments, run, tokenizer, sources=sources, aids=aids, held_out=held_out,
            elsewhere=player is not None,
        )  # fmt: skip
        make = make_fleet or one_engine(config)
        fleet = make(session.learner.engine_model(), tokenizer, session.version)
        elsewhere = watchers(config.watch, run.path, session.version)
        with LiveView(console) as view, elsewhere as write, interrupts() as stopped:
            watch = Watch(view.show, snapshot_of(run), write)
            every = config.scheduler.publish_every
            mirror = None if publish_to is None else Mirror(publish_to, after=session.version, every=every)
            outgoing = Outgoing(session, fleet, mirror, stopped)
            run_loop = Orchestrator(session, fleet, outgoing, watch, player, running, meter)
            asyncio.run(run_loop.run(stopped, partial(save_end, session, tokenizer)))
        finish_run(session, console)
    return run


class Orchestrator:
    """One run, from where its session stands to its last step."""

    def __init__(
        self, session: Session, fleet: Fleet, outgoing: Outgoing, watch: Watch, player: Player | None = None,
        running: Callable[[], int] | None = None, meter: Meter | None = None,
    ) -> None:  # fmt: skip
        """player: None plays the session's environments. The rest is as in `train_rl`."""
        self.session, self.fleet, self.watch, self.player = session, fleet, watch, player or self._episode
        self.outgoing, self.config = outgoing, session.config
        self.meter = meter or Meter()
        self.meter.publishing = outgoing.publishing
        self.patience = Patience(self.config, self.meter)
        self.source = Metered(fleet, self.meter)
        self.playing: dict[str, asyncio.Task[None]] = {}
        self._again: deque[Ticket] = deque()
        """Those of a resumed run that were under way, and have had no place yet."""
        self._running = running or (lambda: len(self.playing))
        self._most = self._preempted = 0
        """Rollouts at once since the last batch; sequences that engines had put back before it."""
        self._learning: asyncio.Task[None] | None = None
        self._in_learners_thread = OneThread()
        self._news: asyncio.Queue[Rollout | Metrics | BaseException] = asyncio.Queue()

    async def run(self, stopped: Callable[[], bool], save: Callable[[], None]) -> None:
        """save: writes the model. Raises `RunInterrupted` after Ctrl-C, and RunError when nothing moves any more."""
        session = self.session
        self.meter.lap()  # what was before is no part of the first step
        try:
            if not await self.outgoing.start():
                self._interrupted()
            session.limit(self._limit())
            self._again.extend(session.under_way())
            while session.version < self.config.steps:
                stop, full, undecided = stopped(), session.vain.full, session.vain.undecided
                await self._advance(learning=not stop, sampling=not stop and (undecided or not full))
                if self._learning is None and stop:
                    self._interrupted()
                if self._learning is None and full and not (undecided and self.playing):  # nothing is left to learn
                    break
                await self._take_news()
                self._most = max(self._most, self._running())
                self.watch.glance(self._running(), self._ready(), lambda: self.fleet.stats().engines)
            await self.outgoing.mirrored(last=True)
            await self._in_learners_thread(session.checkpoint)
            try:
                check_end(session)
                await self._in_learners_thread(save)
            finally:  # behind the model, which is there whatever becomes of the servers
                await self.outgoing.hand_over()
        finally:
            await self._end()

    async def _advance(self, *, learning: bool, sampling: bool) -> None:
        """Everything that can be done now, and is still wanted, is begun."""
        session = self.session
        self._cancel(await self.outgoing.publish())
        if self._learning is None and learning:
            if session.batch is None:
                _, cancelled = session.next_batch()
                self._cancel(cancelled)
            if session.batch is not None:
                self._learning = asyncio.create_task(self._learn(session.batch))
        if sampling:
            while self._again and len(self.playing) < session.scheduler.max_running:
                self._begin(self._again.popleft())
            for ticket in session.admit():  # for these, too, those of before hold places
                self._begin(ticket)
        await asyncio.sleep(0)  # a task that is called off before its first line would tell nobody

    async def _take_news(self) -> None:
        """Waits for something to happen, and deals with all that has."""
        try:
            async with asyncio.timeout(GLANCE):
                news = [await self._news.get()]
        except TimeoutError:
            if self._learning is None:  # what it learns is not lost
                self._check_fleet(None)
            self._check_patience()
            return
        self.meter.moved()
        while not self._news.empty():
            news.append(self._news.get_nowait())
        for item in news:
            if isinstance(item, BaseException):
                self._check_fleet(item)
                raise item
            if isinstance(item, Rollout):
                self.playing.pop(item.id, None)
                self._cancel(self.session.finished([item]))
                if item.outcome in ("env_failure", "timeout"):
                    self.watch.failed(self.session.failure)
                self.watch.note(self.session.vain.starving(self.session.failure))
            else:
                await self._learnt(item)

    # ---- rollouts -------------------------------------------------------------------------------------------------
    def _limit(self) -> int:
        """Rollouts at once, to begin with: as many as the control had come to, unless the settings say another number
        than they said then."""
        scheduler, adapted, given = self.session.scheduler, self.config.concurrency, self.config.scheduler.max_running
        if adapted is None:
            return given
        return min(scheduler.max_running if scheduler.given == given else given, adapted.most)

    def _begin(self, ticket: Ticket) -> None:
        self.playing[ticket.id] = asyncio.create_task(self._play(ticket))
        self._most = max(self._most, self._running())

    async def _play(self, ticket: Ticket) -> None:
        """One rollout, from what is known of it on; its end is news."""
        news: Rollout | BaseException
        try:
            news = await self.player(ticket)
        except asyncio.CancelledError:
            news = aborted(ticket)
        except BaseException as error:
            news = error
        self._news.put_nowait(news)

    async def _episode(self, ticket: Ticket) -> Rollout:
        """An episode of one of the session's environments."""
        return await play(
            ticket,
            self.session.environments[ticket.environment],
            self.source,
            self.config.rollout,
            progress=self._progress,
            away=self._away,
            resume_from=self.session.unfinished.turns(ticket),
        )

    def _progress(self, ticket: Ticket, number: int, first: int, turn: Turn) -> None:
        piece = self.session.report(ticket, number, first, turn)
        self.session.write_pieces("progress", [piece])
        if number == first == 0:
            self.session.began(ticket, turn.versions[0])

    def _away(self, reason: str) -> None:
        self.meter.away()
        self.watch.failed(reason)

    def _cancel(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if ticket.id in self.playing:
                self.playing[ticket.id].cancel()
            elif ticket in self._again:
                self._again.remove(ticket)
                self._news.put_nowait(aborted(ticket))

    # ---- learning -------------------------------------------------------------------------------------------------
    async def _learn(self, batch: Batch) -> None:
        self.meter.learning.begin()
        try:
            self._news.put_nowait(await self._in_learners_thread(self.session.learner.step, batch))
        except BaseException as error:
            self._news.put_nowait(error)
        finally:
            self.meter.learning.end()

    async def _learnt(self, values: Metrics) -> None:
        """A step is done: metrics, weights to the engines, a checkpoint now and then."""
        session, self._learning = self.session, None
        metrics = session.learnt(values)
        self._cancel(await self.outgoing.made())
        lap = self.meter.lap()
        most, self._most = self._most, self._running()
        speed = {"step": metrics["step"], **lap, "running": most, "queue": self._ready()}
        session.run.append("speed", speed)
        if self.config.concurrency is not None:
            self._preempted, load = load_of(self.fleet.stats(), self._preempted, speed)
            limit = session.scheduler.max_running
            session.limit(next_limit(self.config.concurrency, self.config.scheduler, limit, load))
        self.watch.learnt(metrics, speed)
        if session.version % self.config.checkpoint_every == 0 and session.version < self.config.steps:
            await self._in_learners_thread(session.checkpoint)

    def _ready(self) -> int:
        """Groups that wait to be learnt from."""
        return sum(bool(group.weights) for group in self.session.scheduler.groups.values())

    # ---- ends -----------------------------------------------------------------------------------------------------
    def _interrupted(self) -> None:
        """Saves and says so."""
        self.session.checkpoint()
        raise RunInterrupted(
            f"Stopped after step {self.session.version} of {self.config.steps} of rl; all is saved in "
            f"{self.session.run.path}.",
            how_to_go_on(self.config, self.session.run),
        )

    def _check_fleet(self, error: BaseException | None) -> None:
        """Ends a run whose engines are gone for good. error: what somebody got who asked them."""
        failure = self.fleet.failure
        if failure is not None:
            raise RunError(
                f"{failure}; nothing that was finished is lost. {how_to_go_on(self.config, self.session.run)}"
            ) from error

    def _check_patience(self) -> None:
        """A run in which nothing moves says what it waits for; a learner that is at work is only reported."""
        stats = self.fleet.stats()
        waited = self.patience.outlasted(stats)
        if waited is None:
            return
        if self._learning is not None:
            self.watch.note(f"the learner has been at work for {waited // 60:.0f} minutes")
            return
        self.session.journal.commit()
        raise self.patience.exhausted(waited, len(self.playing), stats)

    async def _end(self) -> None:
        """Ends what runs; nothing of it is news any more."""
        for task in self.playing.values():
            task.cancel()
        learning = [self._learning] if self._learning else []  # a step comes to its end: its thread holds the model
        try:
            await ended(self.playing.values())
            await asyncio.gather(*learning, return_exceptions=True)
        finally:
            self._in_learners_thread.close()
            await self.fleet.close()
            self.session.journal.commit()
