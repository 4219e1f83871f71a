"""Where the time goes: tokens as they come, and the time in which nobody samples or nobody learns.

One `Meter` counts for a run; `Metered` sources tell it of their tokens, from whatever thread reads them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from glm5.engine import SamplingParams, TokenDelta
from glm5.engine.outputs import PromptLogprob
from glm5.rl.around import AroundSource
from glm5.serve.generation import Source, TokenSource


class BusyTime:
    """Seconds in which at least one of something was open; any thread may begin and end one."""

    def __init__(self) -> None:
        self.open = 0
        self._total, self._since = 0.0, 0.0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """One more is open."""
        with self._lock:
            if self.open == 0:
                self._since = time.perf_counter()
            self.open += 1

    def end(self) -> None:
        """One less."""
        with self._lock:
            self.open -= 1
            if self.open == 0:
                self._total += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        """Until now."""
        with self._lock:
            return self._total + (time.perf_counter() - self._since if self.open else 0.0)


class Meter:
    """Counts tokens, and the time in which requests are open, the learner is at work or weights are on their way."""

    def __init__(self) -> None:
        self.sampling, self.learning, self.publishing = BusyTime(), BusyTime(), BusyTime()
        self.tokens = 0
        self.refused = 0
        """Tries at environments that were away."""
        self.moved_at = time.monotonic()
        """When something was seen to move."""
        self.somebody_away = False
        """Whether an environment's server, or all engines that may take a request, were seen to be away since then."""
        self._last = time.perf_counter()
        self._before = (0.0, 0.0, 0.0, 0, 0)
        self._lock = threading.Lock()

    def moved(self) -> None:
        """Something other than a token moved."""
        self.moved_at, self.somebody_away = time.monotonic(), False

    def away(self) -> None:
        """An environment's server was asked in vain."""
        self.refused += 1
        self.somebody_away = True

    def sampled(self) -> None:
        """A token came."""
        with self._lock:
            self.tokens += 1
        self.moved()

    def lap(self) -> dict[str, Any]:
        """Shares and speed since the last lap. While weights are published the trainer is not idle: it cannot go on."""
        now = time.perf_counter()
        times = (self.sampling.seconds, self.learning.seconds, self.publishing.seconds)
        values = (*times, self.tokens, self.refused)
        seconds = max(now - self._last, 1e-9)
        sampling, learning, publishing, tokens, refused = (
            new - old for new, old in zip(values, self._before, strict=True)
        )
        self._last, self._before = now, values
        return {
            "seconds": round(seconds, 4),
            "learning_seconds": round(learning, 4),
            "publishing_seconds": round(publishing, 4),
            "sampler_idle": round(max(0.0, 1 - sampling / seconds), 4),
            "trainer_idle": round(max(0.0, 1 - (learning + publishing) / seconds), 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "requests": self.sampling.open,
            "refused": refused,
        }


class Metered(AroundSource[Source]):
    """A source of tokens that tells a meter what another one gives."""

    def __init__(self, source: Source, meter: Meter) -> None:
        super().__init__(source)
        self.meter = meter

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        session_id: str | None,
        priority: int,
        deadline: float | None,
    ) -> TokenSource:
        """The source's, counted."""
        stream = self.source.stream(prompt_ids, params, session_id=session_id, priority=priority, deadline=deadline)
        return _Counted(self.meter, stream)


class _Counted:
    """One request."""

    def __init__(self, meter: Meter, stream: TokenSource) -> None:
        self._meter, self._stream = meter, stream

    @property
    def cached_tokens(self) -> int:
        return self._stream.cached_tokens

    @property
    def prompt_logprobs(self) -> Sequence[PromptLogprob] | None:
        return self._stream.prompt_logprobs

    def close(self) -> None:
        self._stream.close()

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        self._meter.sampling.begin()
        try:
            async for delta in self._stream:
                self._meter.sampled()
                yield delta
        finally:
            self._meter.sampling.end()
