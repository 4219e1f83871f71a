"""What both loops share: learner, scheduler, journal and run directory of one run, brought back to where they were.

The journal is the truth. To go on, the learner takes its newest checkpoint, the events of the journal are applied to a
new scheduler, and the batches that came after the checkpoint are learnt from again, which gives the same weights to the
bit. What was finished is not sampled again; what was under way goes on from the tokens that the journal holds of it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from glm5.envs import Environment
from glm5.errors import ConfigError, RunError, did_you_mean
from glm5.model import GLM5
from glm5.rl.advice import think_first
from glm5.rl.aids import Aids
from glm5.rl.asking import quoted
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import Piece, Unfinished, events_of, pieces_of, write_events, write_pieces
from glm5.rl.events import BatchMade, Cancelled, Event, Finished, Published, Started
from glm5.rl.journal import Journal, Record
from glm5.rl.learner import Learner
from glm5.rl.learnt import Learnt, ended
from glm5.rl.records import Batch, Metrics, Rollout, Ticket, Turn
from glm5.rl.scheduler import Scheduler
from glm5.rl.seen import write_seen
from glm5.rl.tasks import TaskSource, TaskStream
from glm5.rl.vain import Vain
from glm5.rl.window import Window
from glm5.train import RunDirectory

log = logging.getLogger("glm5.rl")
JOURNAL = "journal"
BROKEN_GROUPS, BROKEN_LEAST = 4, 16
"""Groups, but at least so many rollouts, that fail in a row before an environment counts as broken: besides as many as
run at once, which one restart of its server fails all together."""


class Session:
    """One run in this process. Not thread-safe; `learn` alone may run in another thread."""

    def __init__(
        self,
        config: RLRunConfig,
        environments: Sequence[Environment],
        run: RunDirectory,
        model: GLM5,
        sources: Sequence[TaskSource] | None = None,
        aids: Aids | None = None,
        *,
        elsewhere: bool = False,
    ) -> None:
        """model: the parent's; it becomes that of the learner's newest version. Trains where the journal is ahead.

        elsewhere: whether others play the episodes, who cannot be told how.
        """
        self.config, self.run, self.path = config, run, run.path / JOURNAL
        self.environments = {environment.name: environment for environment in environments}
        self.learner = Learner(
            model, config.learner, steps=config.steps, aids=aids, publish_every=config.scheduler.publish_every,
            temperature=config.rollout.temperature,
        )  # fmt: skip
        self.version = first = self.learner.load(run)
        """Batches that were learnt from. The learner's own version moves in another thread, before anybody knows."""
        run.rewind(first)
        self.scheduler = Scheduler(config.scheduler, task_stream(environments, sources, config.rollout.seed))
        self.unfinished = Unfinished()
        self.tick = 0
        """Of the logical clock; what was written at a later one belongs to a tick that is not over."""
        self.started_at: dict[str, int] = {}
        """Tick at which a running rollout was started, by id."""
        self.batch: Batch | None = None
        """Handed out and not learnt from."""
        self.batch_tick = 0
        self._window, self._figures = Window(), dict[str, Any]()
        size = config.scheduler.group_size
        self.vain = Vain(self.environments, size, config.groups_in_vain * size)
        self.failure = ""
        """Of the newest rollout that failed: environment and reason."""
        self.elsewhere = self._advised = elsewhere
        self._failed: Counter[str] = Counter()
        """Rollouts that failed in an environment since one of it was scored, by its name."""
        self.journal = Journal(self.path, self._replay)
        if self.scheduler.step < first:
            raise RunError(
                f"{self.path} ends before batch {first - 1}, which the newest checkpoint has learnt from; restore the "
                "file, or start a new run."
            )
        self._failed.clear()  # what was broken may be mended now
        asked_for_more = Learnt.read(run.path) is not None and not ended(run.path, config.steps)
        self.vain.resumed(go_on=asked_for_more)

    # ---- coming back ----------------------------------------------------------------------------------------------
    def _replay(self, record: Record) -> None:
        """A line of the journal."""
        if record["kind"] == "tick":
            self.tick = record["tick"]
        for piece in pieces_of(record):
            self.unfinished.add(piece)
        for event in events_of(record):
            if isinstance(event, BatchMade):
                batch = self._batch_of(event)
                self.scheduler.apply(event)
                self.vain.note(event)
                self._handed_out(batch, record["tick"])
            else:
                self.scheduler.apply(event)
                self._noted([event], record["tick"])

    def _batch_of(self, event: BatchMade) -> Batch:
        """The batch itself; its rollouts are still in the scheduler's groups."""
        groups = []
        for selection in event.selections:
            rollouts = self.scheduler.groups[selection.ticket.id].rollouts
            groups.append(selection.group({rollout.id: rollout for rollout in rollouts.values()}))
        return Batch(event.step, event.step, tuple(groups))

    def under_way(self) -> list[Ticket]:
        """Rollouts to play again from what is known of them, when the session has come back."""
        tickets = self.scheduler.restarted() if self.journal.count else []
        self._written()
        self.note_beginnings()
        return tickets

    # ---- the scheduler, with its journal --------------------------------------------------------------------------
    def admit(self) -> list[Ticket]:
        """The rollouts to start now: those of groups that were begun, where what is under way decides on the end."""
        tickets = self.scheduler.admit(new_groups=not self.vain.undecided)
        self._written()
        return tickets

    def began(self, ticket: Ticket, version: int) -> None:
        """The first token of a rollout was made by these weights."""
        self.scheduler.began(ticket, version)
        self._written()

    def note_beginnings(self) -> None:
        """`began` for every running rollout that has a token."""
        for ticket, _ in list(self.scheduler.running.values()):
            version = self.unfinished.first_version(ticket)
            if version is not None:
                self.began(ticket, version)

    def finished(self, rollouts: Sequence[Rollout]) -> list[Ticket]:
        """Rollouts came back, in this order; gives those that are called off therefore."""
        cancelled: list[Ticket] = []
        for rollout in rollouts:
            self.scheduler.finished(rollout)
            cancelled += self._written()
        for rollout in rollouts:
            self._check_environment(rollout)
        self._advise()
        return cancelled

    def _advise(self) -> None:
        """Once in a sitting."""
        if not (self._advised or self.config.rollout.thinking):
            advice = think_first(self.scheduler.accounts, self.config.scheduler.group_size)
            if advice is not None:
                self._advised = True
                log.warning(advice)

    def _check_environment(self, newest: Rollout) -> None:
        """A run one of whose environments always fails says so, instead of sampling for ever."""
        name = newest.ticket.environment
        most = max(BROKEN_GROUPS * self.config.scheduler.group_size, BROKEN_LEAST) + self.scheduler.max_running
        if newest.outcome == "env_failure" and self._failed[name] >= most:
            self.journal.commit()
            raise RunError(
                f"The last {self._failed[name]} rollouts of {name} all failed, the newest with "
                f"{quoted(newest.failure)}. Mend the environment, then resume the run."
            )

    def next_batch(self) -> tuple[Batch | None, list[Ticket]]:
        """What to learn from next, if there is enough and nothing waits to be learnt; and who is called off."""
        if self.batch is not None:
            return None, []
        batch = self.scheduler.next_batch()
        cancelled = self._written()
        if batch is not None:
            self.journal.commit()
            self._handed_out(batch, self.tick)
        return batch, cancelled

    def published(self, version: int) -> list[Ticket]:
        """The engines hold these weights; gives the rollouts that are called off therefore."""
        self.scheduler.published(version)
        cancelled = self._written()
        self.journal.commit()
        return cancelled

    def limit(self, max_running: int) -> None:
        """Rollouts at once from now on."""
        self.scheduler.limit(max_running)
        self._written()

    def report(self, ticket: Ticket, number: int, first: int, turn: Turn) -> Piece:
        """What a progress report adds to what is known."""
        piece = self.unfinished.news(ticket, number, first, turn)
        self.unfinished.add(piece)
        return piece

    def write_pieces(self, kind: str, pieces: Sequence[Piece]) -> None:
        """To the journal."""
        write_pieces(self.journal, kind, pieces, self.tick)

    def _written(self) -> list[Ticket]:
        """Writes what the scheduler's last call brought about; gives the rollouts that it called off."""
        events = self.scheduler.take_events()
        write_events(self.journal, events, self.tick)
        self._noted(events, self.tick)
        return [event.ticket for event in events if isinstance(event, Cancelled)]

    def _noted(self, events: Sequence[Event], tick: int) -> None:
        """What is kept beside the scheduler's own state, alike for events that happen and for those of the journal."""
        self.unfinished.forget(events)
        for event in events:
            self.vain.note(event)
            if isinstance(event, Started):
                self.started_at[event.ticket.id] = tick
            elif isinstance(event, Cancelled):
                self.started_at.pop(event.ticket.id, None)
            elif isinstance(event, Finished):
                self._window.add(event.rollout)
                self.started_at.pop(event.rollout.id, None)
                self._note_failure(event.rollout)
            elif isinstance(event, Published):
                while self.version < event.version:
                    self.learn()

    def _note_failure(self, rollout: Rollout) -> None:
        name = rollout.ticket.environment
        if rollout.reward is not None:
            self._failed[name] = 0
        elif rollout.outcome != "aborted":
            self._failed[name] += rollout.outcome == "env_failure"
            self.failure = f"{name}: {quoted(rollout.failure)}"

    def _handed_out(self, batch: Batch, tick: int) -> None:
        """A batch was made: if the one before was not learnt from again yet, it is now."""
        if self.batch is not None:
            self.learn()
        figures = self._window.close(batch, self.scheduler.accounts)
        if batch.step >= self.version:
            self.batch, self.batch_tick, self._figures = batch, tick, figures

    # ---- learning -------------------------------------------------------------------------------------------------
    def learn(self) -> Metrics:
        """Learns from the batch that was handed out; gives its line of metrics."""
        if self.batch is None:
            raise RunError(
                f"{self.path} holds version {self.version + 1} without the batch that made it; restore the "
                "file, or start a new run."
            )
        return self.learnt(self.learner.step(self.batch))

    def learnt(self, values: Metrics) -> Metrics:
        """The learner has learnt from the batch: writes the line of metrics."""
        assert self.batch is not None
        others = {"mean_staleness" if name == "staleness" else name: value for name, value in values.items()}
        # Of what came back and of what was learnt from, also where a loss names a figure as one of the others.
        named = {f"trained_{name}" if name in self._figures else name: value for name, value in others.items()}
        metrics = {"step": self.batch.step, **named, **self._figures}
        if self.config.keep_logprobs:
            write_seen(self.run.path, self.batch.step, self.learner.logprobs)
        self.run.append("metrics", metrics)
        self.batch, self.version = None, self.learner.version
        return metrics

    def checkpoint(self) -> None:
        """Saves the learner; the journal behind it is on the disk first."""
        self.journal.commit()
        self.learner.save(self.run, keep=self.config.keep_checkpoints)


def task_stream(environments: Sequence[Environment], sources: Sequence[TaskSource] | None, seed: int) -> TaskStream:
    """The tasks of a run: `sources` say how each environment takes part, by default with its own rules, all alike."""
    names = [environment.name for environment in environments]
    if sources is None:
        sources = [TaskSource.of(environment) for environment in environments]
    for source in sources:
        if source.environment not in names:
            raise ConfigError(
                f"A task source names {source.environment!r}, which is no environment of the run."
                + did_you_mean(source.environment, names)
            )
    return TaskStream(sources, seed)
