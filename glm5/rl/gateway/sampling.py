"""A source that samples from the model itself, whatever a request asks for, by random numbers that belong to the run.

An agent program may ask for temperature 0 or a fixed seed: all attempts at a task would then be the same, and nothing
could be learnt from their difference. And the losses take the recorded log-probabilities for those of the policy that
sampled. So temperature, cuts, penalties, biases, bad words and seeds are the gateway's; lengths, stop strings and
structure stay the agent's. The seed of a request follows from the run's seed, the session, the prompt, and how often it
came before, so that the same sessions are sampled the same, whatever runs beside them, and however often the gateway
was killed.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from glm5.engine import SamplingParams
from glm5.rl.around import AroundSource
from glm5.serve.generation import Source, TokenSource

MOST_REMEMBERED = 65_536
"""Requests of which is known how often they came."""


class OwnDistribution(AroundSource[Source]):
    """`source` at temperature 1 with nothing cut off; `seed`: the run's."""

    def __init__(self, source: Source, seed: int = 0) -> None:
        super().__init__(source)
        self.seed = seed
        self._asked: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        session_id: str | None,
        priority: int,
        deadline: float | None,
    ) -> TokenSource:
        """The tokens of a request."""
        own = replace(
            params, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
            frequency_penalty=0.0, logit_bias=None, bad_sequences=(), min_tokens=0,
            seed=self._seed(session_id, prompt_ids),
        )  # fmt: skip
        return self.source.stream(prompt_ids, own, session_id=session_id, priority=priority, deadline=deadline)

    def answered(self, session_id: str, prompt_ids: Sequence[int]) -> None:
        """This prompt was answered before, by an earlier process: whoever repeats it is not given that answer again."""
        self._count(self._asked_of(session_id, prompt_ids))

    def _seed(self, session_id: str | None, prompt_ids: Sequence[int]) -> int:
        asked = self._asked_of(session_id, prompt_ids)
        times = self._count(asked)
        return int.from_bytes(hashlib.sha256(asked + times.to_bytes(8, "little")).digest()[:8], "little") >> 1

    def _asked_of(self, session_id: str | None, prompt_ids: Sequence[int]) -> bytes:
        return hashlib.sha256(f"{self.seed}/{session_id}/{list(prompt_ids)}".encode()).digest()

    def _count(self, asked: bytes) -> int:
        """Once more; gives how often it was before."""
        with self._lock:
            if len(self._asked) >= MOST_REMEMBERED:  # whoever repeats a request so late may get the same answer
                self._asked.clear()
            self._asked[asked] += 1
            return self._asked[asked] - 1
