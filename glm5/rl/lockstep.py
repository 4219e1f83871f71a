"""Deterministic mode: one process, a strict engine stepped by hand, and a logical clock that orders everything.

A tick: the rollouts that were admitted begin; each one that waits for a token gets exactly one; environments answer
until everybody waits again; what finished is taken in the order of the tickets; a batch that was handed out
`learning_ticks` ago is learnt from and its weights are published, in the middle of whatever is being written; the next
batch is handed out. So staleness and swaps inside a sequence are those of an asynchronous run, and yet all that happens
follows from settings, environments and weights. The wall clock has no part: time limits of environments do not count.

The line of a tick in the journal says that it is over. Killed at any moment, the run begins the tick again that was not
over, and learns the same to the bit. Environments must answer the same when they are asked the same.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from glm5.engine import Engine, SamplingParams, TokenDelta, TokenStream
from glm5.engine.outputs import PromptLogprob
from glm5.envs import Environment
from glm5.errors import ConfigError, RunError
from glm5.rl.aids import Aids
from glm5.rl.around import AroundSource
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import Piece
from glm5.rl.executors import engine_settings
from glm5.rl.records import Rollout, Ticket, Turn, aborted
from glm5.rl.run_ends import check_end, finish_run, how_to_go_on, open_session, reopened, save_end, started_run
from glm5.rl.runner import play
from glm5.rl.session import Session
from glm5.rl.tasks import TaskSource
from glm5.text import Tokenizer
from glm5.train import RunDirectory, RunInterrupted
from glm5.train.job import disk_errors
from glm5.train.progress import progress_bar
from glm5.train.run_directory import model_of
from glm5.train.watch import Write, watchers


def train_in_lockstep(
    config: RLRunConfig,
    environments: Sequence[Environment],
    run_directory: Path,
    *,
    sources: Sequence[TaskSource] | None = None,
    aids: Aids | None = None,
    held_out: Sequence[Environment] = (),
    resume: bool = False,
    console: Console | None = None,
) -> RunDirectory:
    """`train_rl` in deterministic mode: the same arguments give the same run, however often it is killed and resumed.

    Ctrl-C stops at once (`RunInterrupted`); nothing is lost by it.
    """
    if config.scheduler.mode != "async" or config.scheduler.publish_every != 1:
        raise ConfigError("The deterministic mode is asynchronous and publishes every batch; change the scheduler's.")
    if config.concurrency is not None and not resume:  # earlier versions took it and did nothing with it
        raise ConfigError(
            "The deterministic mode keeps scheduler.max_running rollouts under way: what engines and trainer bear is a "
            "matter of the clock; leave concurrency out."
        )
    tokenizer = Tokenizer.from_pretrained(model_of(config.parent))
    started = started_run(
        config, environments, run_directory, sources=sources, aids=aids, held_out=held_out, deterministic=True,
        resume=resume,
    )  # fmt: skip
    with started as run, disk_errors(run):
        if not reopened(run, config, console):
            return run
        session = open_session(
            config, environments, run, tokenizer, sources=sources, aids=aids, held_out=held_out, timed=False
        )  # fmt: skip
        try:
            elsewhere = watchers(config.watch, run.path, session.version)
            with progress_bar("rl", session.version, config.steps, console) as show, elsewhere as write:
                asyncio.run(Lockstep(session, tokenizer, show, write).run())
        except KeyboardInterrupt:
            raise RunInterrupted(
                f"Stopped in step {session.version} of {config.steps} of rl; all is in {run.path}.",
                how_to_go_on(config, run),
            ) from None
        save_end(session, tokenizer)
        finish_run(session, console)
    return run


class Lockstep:
    """The ticks of one run, from where its session stands."""

    def __init__(
        self, session: Session, tokenizer: Tokenizer, show: Callable[[int, str, float], None], write: Write
    ) -> None:
        self.session, self.show, self.write, self.config = session, show, write, session.config
        self.rollout = replace(self.config.rollout, report_every=1)
        self.engine = Engine(
            copy.deepcopy(session.learner.engine_model()),
            tokenizer,
            **engine_settings(self.config),
            strict=True,
            version=session.scheduler.version,
            threaded=False,
        )
        self.source = TokenGate(self.engine)
        self.playing: dict[str, asyncio.Task[Rollout]] = {}
        """By session."""
        self._pieces: list[Piece] = []
        self._lap = (time.monotonic(), 0)
        """When the last step ended, and the tokens until then."""

    async def run(self) -> None:
        """To the last step."""
        session = self.session
        try:
            # The tick that the journal ended in may have more to it; who was admitted in it begins with the next one.
            admitted = []
            for ticket in session.under_way():
                if session.started_at[ticket.id] <= session.tick:
                    self._begin(ticket)
                else:
                    admitted.append(ticket)
            await self._settle()
            await self._after_tokens()
            while session.version < self.config.steps and not self._in_vain():
                await self._tick(admitted)
                admitted = []
            session.checkpoint()
            check_end(session)
        finally:
            for task in self.playing.values():
                task.cancel()
            await asyncio.gather(*self.playing.values(), return_exceptions=True)
            self.engine.close()
            session.journal.commit()

    def _in_vain(self) -> bool:
        """Whether the run ends before its last step."""
        vain = self.session.vain
        return vain.full and self.session.batch is None and not (vain.undecided and self.playing)

    async def _tick(self, admitted: Sequence[Ticket]) -> None:
        """One tick."""
        session = self.session
        session.tick += 1
        for ticket in [*admitted, *session.admit()]:
            self._begin(ticket)
        if not self.playing and session.batch is None:
            raise RunError(f"At tick {session.tick} nothing runs and nothing is learnt from; the run cannot go on.")
        await self._settle()
        self.source.deliver()
        await self._settle()
        session.write_pieces("tick", sorted(self._pieces, key=lambda piece: piece.ticket))
        await self._after_tokens()

    async def _after_tokens(self) -> None:
        """The second half of a tick, which can be begun again anywhere."""
        session = self.session
        self._pieces.clear()
        session.note_beginnings()
        await self._take_finished()
        if session.batch is not None and session.tick - session.batch_tick >= self.config.learning_ticks:
            await self._learn()
        if session.version < self.config.steps:
            _, cancelled = session.next_batch()
            await self._call_off(cancelled)

    # ---- rollouts -------------------------------------------------------------------------------------------------
    def _begin(self, ticket: Ticket) -> None:
        environment = self.session.environments[ticket.environment]
        self.playing[ticket.session] = asyncio.create_task(
            play(
                ticket, environment, self.source, self.rollout,
                progress=self._progress, resume_from=self.session.unfinished.turns(ticket), timed=False,
            )
        )  # fmt: skip

    def _progress(self, ticket: Ticket, number: int, first: int, turn: Turn) -> None:
        self._pieces.append(self.session.report(ticket, number, first, turn))

    async def _settle(self) -> None:
        """Until every rollout waits for a token, or has ended."""
        while True:
            self.source.changed.clear()
            busy = [t for name, t in self.playing.items() if not t.done() and name not in self.source.waiting]
            if not busy:
                return
            changed = asyncio.ensure_future(self.source.changed.wait())
            await asyncio.wait([*busy, changed], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()

    async def _take_finished(self) -> None:
        """Gives the scheduler what ended, in the order of the tickets."""
        done = {name: task for name, task in self.playing.items() if task.done()}
        for rollout in sorted((task.result() for task in done.values()), key=lambda rollout: rollout.ticket):
            del self.playing[rollout.ticket.session]
            await self._call_off(self.session.finished([rollout]))

    async def _call_off(self, tickets: Sequence[Ticket]) -> None:
        """Ends rollouts; those that have ended by themselves come back in their turn."""
        for ticket in tickets:
            task = self.playing.get(ticket.session)
            if task is not None and not task.done():
                del self.playing[ticket.session]
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                await self._call_off(self.session.finished([aborted(ticket)]))

    # ---- learning -------------------------------------------------------------------------------------------------
    async def _learn(self) -> None:
        """Learns from the batch; the engine goes on with the new weights."""
        session = self.session
        metrics = session.learn()
        version = session.version
        cancelled = session.published(version)
        if version > self.engine.version:
            self.engine.update_weights(version, session.learner.weights(), recompute=self.config.recompute)
        await self._call_off(cancelled)
        self.write(metrics["step"], metrics)
        self.show(version, f"reward of the batch {metrics['trained_reward']:.3f}", self._speed())
        if version % self.config.checkpoint_every == 0 and version < self.config.steps:
            session.checkpoint()

    def _speed(self) -> float:
        """Tokens per second since the last step, for people: nothing hangs on it."""
        (then, before), (now, tokens) = self._lap, (time.monotonic(), self.engine.stats().sampled_tokens)
        self._lap = now, tokens
        return (tokens - before) / max(now - then, 1e-9)


class TokenGate(AroundSource[Engine]):
    """An engine as a source of tokens that come out only when `deliver` is called, one for everybody who waits."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.waiting: dict[str, GatedStream] = {}
        """By session."""
        self.changed = asyncio.Event()
        """Set when somebody begins to wait."""

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        session_id: str | None,
        priority: int,
        deadline: float | None,
    ) -> GatedStream:
        """One request of a session, which has no other one open."""
        assert session_id is not None
        stream = self.source.stream(prompt_ids, params, session_id=session_id, priority=priority, deadline=deadline)
        return GatedStream(self, session_id, stream)

    def deliver(self) -> None:
        """Runs the engine until everybody who waits has a token, and hands them out."""
        while self.source.step():
            pass
        waiting, self.waiting = self.waiting, {}
        for stream in waiting.values():
            stream.take()


class GatedStream:
    """The tokens of one request."""

    def __init__(self, gate: TokenGate, session: str, stream: TokenStream) -> None:
        self._gate, self._session, self._stream = gate, session, stream
        self._next: asyncio.Future[TokenDelta | None] | None = None

    @property
    def cached_tokens(self) -> int:
        return self._stream.cached_tokens

    @property
    def prompt_logprobs(self) -> Sequence[PromptLogprob] | None:
        return self._stream.prompt_logprobs

    def close(self) -> None:
        """Ends the request."""
        self._gate.waiting.pop(self._session, None)
        self._stream.close()

    def take(self) -> None:
        """Hands out the token that the engine has made."""
        assert self._next is not None
        try:
            delta = self._stream.poll()
            if delta is None:
                raise RuntimeError(f"the engine made no token for {self._session}")
            self._next.set_result(delta)
        except EOFError:
            self._next.set_result(None)
        except Exception as error:
            self._next.set_exception(error)

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        ended = False
        while not ended:
            self._next = asyncio.get_running_loop().create_future()
            self._gate.waiting[self._session] = self
            self._gate.changed.set()
            delta = await self._next
            if delta is None:
                return
            ended = delta.finish_reason is not None
            yield delta
