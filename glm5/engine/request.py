"""A request between the threads: its completions, where their tokens are delivered, and when it must end."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from glm5.engine.outputs import PromptLogprob, RequestOutput, TokenDelta
from glm5.engine.sequence import Sequence

BUFFERED_TOKENS = 256
"""Tokens that wait for a slow reader before its request is paused; it goes on when half of them are read."""


class Mailbox:
    """The tokens of one request on their way from the engine's thread to one reader, who may be slow.

    `full` tells the scheduler to pause the request; `limit=None` never pauses (the reader only waits for the end).
    """

    def __init__(self, limit: int | None, drained: Callable[[], None]) -> None:
        self.limit, self._drained = limit, drained
        self.full = False
        self.finished = False
        self._deltas: deque[TokenDelta] = deque()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._callback: Callable[[], None] | None = None

    def put(self, deltas: list[TokenDelta]) -> None:
        """Delivers tokens (the engine's side)."""
        self._change(deltas, finished=False, error=None)

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more will come; the reader gets the error, if there is one, after the tokens."""
        self._change([], finished=True, error=error)

    def abandon(self) -> None:
        """The reader wants nothing more, not even what is here."""
        self.finish()
        with self._changed:
            self._deltas.clear()

    def _change(self, deltas: list[TokenDelta], *, finished: bool, error: BaseException | None) -> None:
        with self._changed:
            if self.finished:
                return
            self._deltas.extend(deltas)
            self.finished, self._error = finished, error
            self.full = self.full or (self.limit is not None and len(self._deltas) >= self.limit)
            callback, self._callback = self._callback, None
            if finished or self.limit is not None:  # without a limit the reader only waits for the end
                self._changed.notify_all()
        if callback is not None:
            callback()

    def take(self) -> TokenDelta | None:
        """The next token, or None when there is none yet. At the end raises EOFError, or the request's error once."""
        resumes = False
        with self._changed:
            if not self._deltas:
                if not self.finished:
                    return None
                error, self._error = self._error, None
                raise error if error is not None else EOFError
            delta = self._deltas.popleft()
            if self.full and self.limit is not None and len(self._deltas) <= self.limit // 2:
                self.full, resumes = False, True
        if resumes:
            self._drained()
        return delta

    def raise_error(self) -> None:
        """Raises the error that ended the request, if one did."""
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self, *, for_end: bool = False) -> None:
        """Blocks until there is something to take, or until the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.finished or (bool(self._deltas) and not for_end))

    def call_when_ready(self, callback: Callable[[], None]) -> bool:
        """Calls back once, from the engine's thread, at the next change; False if there is something to take now."""
        with self._changed:
            if self.finished or self._deltas:
                return False
            self._callback = callback
            return True


@dataclass(eq=False)
class Request:
    """One admitted request. Only the engine's thread changes it, but for `aborted`, which anybody may set."""

    number: int
    """In order of arrival."""
    sequences: list[Sequence]
    """Its `n` completions. The first computes the prompt; the others are forked from it at the first token."""
    mailbox: Mailbox
    rank: float
    """Its place in the queue, in seconds: the time of arrival, moved by the priority."""
    salt: str | None
    deadline: float | None
    """When it must have ended, by `time.monotonic`."""
    cached_tokens: int | None = None
    """Prompt tokens that came from the prefix cache."""
    prompt_logprobs: list[PromptLogprob] | None = None
    """Grows while the prompt is computed; None when they are not wanted."""
    aborted: bool = False
    step_failed: bool = False
    """Whether it ended with a step that failed as a whole, and not by an error of its own."""
    forked: bool = False
    """Whether every sequence stands for itself: from the first token on, or from the start when it goes on."""
    place: tuple[float, int] = field(init=False)
    first: Sequence = field(init=False)
    """The one that computes the prompt for all: the first, or when it goes on the first that has not ended."""

    def __post_init__(self) -> None:
        self.place = (self.rank, self.number)
        self.first = next((sequence for sequence in self.sequences if not sequence.done), self.sequences[0])

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still missing."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.first.prompt_ids)

    def prompt_of(self, sequence: Sequence) -> list[PromptLogprob] | None:
        """The prompt's log-probabilities so far, if this sequence computes those that are missing."""
        return self.prompt_logprobs if sequence is self.first and self.wants_prompt else None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        return not self.wants_prompt and all(sequence.done for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """What there is of it."""
        return RequestOutput(
            self.sequences[0].prompt_ids,
            tuple(sequence.output() for sequence in self.sequences),
            self.cached_tokens or 0,
            None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )


def finish_all(requests: Iterable[Request], error: BaseException | None) -> None:
    """Nothing more will come of any of them."""
    for request in requests:
        with contextlib.suppress(Exception):  # of a reader's callback, which must not keep others from their end
            request.mailbox.finish(error)
