"""A request of a fleet: what is needed to begin it on any engine, and to go on with it on another."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glm5.engine import SamplingParams, TokenDelta
from glm5.engine.outputs import FinishReason, PromptLogprob
from glm5.engine.request import Mailbox
from glm5.engine.stream import MailboxReader

if TYPE_CHECKING:
    from glm5.rl.fleet.config import FleetConfig
    from glm5.rl.fleet.member import Member

PROGRESS = 64
"""Tokens from an engine after which its death is not counted together with earlier ones."""
FEW = 8
"""Tokens that are no sign yet that an engine takes a request: some give one each time before they fail at it."""
UNBOUNDED = 1 << 40
"""A fleet's mailbox never pauses its request: a rollout is read as it is written."""

OVERDUE_SECONDS = 2.0
"""After its deadline an engine ends a request itself; so much later the fleet does."""


@dataclass(frozen=True, slots=True)
class Order:
    """What an engine is asked for. Its seed is set, so that every engine draws the same numbers."""

    number: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    session_id: str | None
    priority: int
    deadline: float | None
    """Seconds from now."""
    said: tuple[TokenDelta, ...]


@dataclass(frozen=True, slots=True)
class Delivery:
    """New tokens of one request, on their way from an engine."""

    number: int
    deltas: list[TokenDelta]
    cached_tokens: int
    prompt_logprobs: Sequence[PromptLogprob] | None


@dataclass(eq=False)
class Job:
    """One request. The fleet alone changes it, under its lock."""

    number: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    session_id: str | None
    priority: int
    until: float | None
    """When it must have ended, by `time.monotonic`."""
    said: list[TokenDelta]
    """Every token so far, those that it was begun with included."""
    mailbox: Mailbox = field(default_factory=lambda: Mailbox(UNBOUNDED, lambda: None))
    member: Member | None = None
    """The engine that it runs on."""
    moves: int = 0
    """Engines that died under it in a row, each before it had got on."""
    moved_at: float = 0.0
    """When the first of these died."""
    refused: dict[Member, Exception] = field(default_factory=dict)
    """Engines that failed at it while they took others, and how, since it last got more than a few tokens from one."""
    begun_with: int = 0
    """Tokens that it had when its engine began it."""
    cached_tokens: int = 0
    prompt_logprobs: tuple[PromptLogprob, ...] | None = None

    @property
    def tokens(self) -> int:
        """That an engine reads to begin it."""
        return len(self.prompt_ids) + len(self.said)

    def order(self) -> Order:
        """What the next engine is asked for."""
        self.begun_with = len(self.said)
        left = None if self.until is None else max(self.until - time.monotonic(), 1e-3)
        return Order(self.number, self.prompt_ids, self.params, self.session_id, self.priority, left, tuple(self.said))

    def overdue(self, now: float) -> bool:
        """Whether the fleet ends it: at its deadline, or later when an engine has it, which should have done so."""
        return self.until is not None and now > self.until + OVERDUE_SECONDS * (self.member is not None)

    def orphaned(self, *, blamed: bool) -> bool:
        """Its engine died; True if it had got nothing from it."""
        gained = len(self.said) - self.begun_with
        self.member = None
        if blamed:
            self.moves = 1 if gained >= PROGRESS else self.moves + 1
            self.moved_at = time.monotonic() if self.moves == 1 else self.moved_at
        return gained == 0

    def hopeless(self, config: FleetConfig) -> bool:
        """Whether too many engines died under it, over too long a time."""
        return self.moves > config.max_moves and time.monotonic() - self.moved_at >= config.outage_seconds

    def take(self, delivery: Delivery) -> None:
        """Adds tokens."""
        if not self.mailbox.finished:
            self.cached_tokens = self.cached_tokens or delivery.cached_tokens
            if self.prompt_logprobs is None and delivery.prompt_logprobs is not None:
                self.prompt_logprobs = tuple(delivery.prompt_logprobs)
            self.said += delivery.deltas
            if len(self.said) - self.begun_with > FEW:
                self.refused.clear()
            self.mailbox.put(delivery.deltas)


class FleetStream(MailboxReader):
    """The reader's end of a job, as `glm5.engine.TokenStream` is of an engine's request."""

    def __init__(self, job: Job, abort: Callable[[Job], None], dropped: deque[Job]) -> None:
        self._job, self._mailbox, self._abort, self._dropped = job, job.mailbox, abort, dropped

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first engine took from its prefix cache."""
        return self._job.cached_tokens

    @property
    def prompt_logprobs(self) -> tuple[PromptLogprob, ...] | None:
        """One entry per prompt token (None for the first), complete with the first token; None if not asked for."""
        return self._job.prompt_logprobs

    @property
    def finish_reasons(self) -> tuple[FinishReason | None, ...]:
        """Why each completion ended; None while it runs."""
        reasons: list[FinishReason | None] = ["abort" if self._mailbox.finished else None] * self._job.params.n
        for delta in self._job.said:
            reasons[delta.index] = delta.finish_reason or reasons[delta.index]
        return tuple(reasons)

    def close(self) -> None:
        """Stops the request."""
        self._abort(self._job)

    async def aclose(self) -> None:
        """`close`, for asyncio."""
        self.close()

    def __del__(self) -> None:
        if not self._mailbox.finished:
            self._dropped.append(self._job)
