"""The reader's end of a running request: an iterator for threads and one for asyncio, over the same buffer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Self

from glm5.engine.outputs import FinishReason, PromptLogprob, TokenDelta
from glm5.engine.request import Mailbox, Request


class MailboxReader:
    """Iterates over the tokens of a mailbox, with `for` or with `async for`, which needs no thread."""

    _mailbox: Mailbox

    def poll(self) -> TokenDelta | None:
        """The next token, or None when there is none yet; raises EOFError at the end. Never waits."""
        return self._mailbox.take()

    # ---- threads ------------------------------------------------------------------------------------------------
    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenDelta:
        while True:
            try:
                delta = self._mailbox.take()
            except EOFError:
                raise StopIteration from None
            if delta is not None:
                return delta
            self._mailbox.wait()

    # ---- asyncio ------------------------------------------------------------------------------------------------
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenDelta:
        while True:
            try:
                delta = self._mailbox.take()
            except EOFError:
                raise StopAsyncIteration from None
            if delta is not None:
                return delta
            loop = asyncio.get_running_loop()
            ready: asyncio.Future[None] = loop.create_future()
            if self._mailbox.call_when_ready(partial(_wake, loop, ready)):
                await ready


class TokenStream(MailboxReader):
    """Sampled tokens as they come, of all `n` completions in turn. `close()`, or losing the last reference, aborts.

    A request that was aborted, by its deadline too, just ends: no last token carries a finish reason then (see
    `finish_reasons`).
    """

    def __init__(self, request: Request, abort: Callable[[Request], None]) -> None:
        self._request, self._mailbox, self._abort = request, request.mailbox, abort

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache; 0 until the first token is there."""
        return self._request.cached_tokens or 0

    @property
    def step_failed(self) -> bool:
        """Whether its error is that of a whole step, which took all requests in it along, and not its own."""
        return self._request.step_failed

    @property
    def prompt_logprobs(self) -> tuple[PromptLogprob, ...] | None:
        """One entry per prompt token (None for the first), complete with the first token; None if not asked for."""
        found = self._request.prompt_logprobs
        return None if found is None else tuple(found)

    @property
    def finish_reasons(self) -> tuple[FinishReason | None, ...]:
        """Why each completion ended; None while it runs."""
        ended = self._request.mailbox.finished
        return tuple(s.deltas[-1].finish_reason if s.done else "abort" if ended else None
                     for s in self._request.sequences)  # fmt: skip

    def close(self) -> None:
        """Stops the request, at the latest after the step that runs now; what it held is given back."""
        self._abort(self._request)

    async def aclose(self) -> None:
        """`close`, for asyncio."""
        self.close()

    def __del__(self) -> None:
        if not self._request.mailbox.finished:
            self.close()


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():  # the reader may have been cancelled
        ready.set_result(None)


def _wake(loop: asyncio.AbstractEventLoop, ready: asyncio.Future[None]) -> None:
    """From another thread. A loop that was closed has nobody left to wake."""
    try:
        loop.call_soon_threadsafe(_set, ready)
    except RuntimeError:
        if not loop.is_closed():
            raise
