"""Pauses between tries at somebody who is away: an environment's server, or an engine's.

They double, and each is cut at random, so that many who wait do not come back all at once (Brooker 2015, "Exponential
backoff and jitter"). Nothing that is learnt depends on them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

FIRST, LONGEST = 0.5, 30.0
"""Seconds of the first pause, and of all after some doublings."""


def jittered(seconds: float) -> float:
    """Between half of it and all."""
    return random.uniform(seconds / 2, seconds)


def pauses(seconds: float) -> Iterator[float]:
    """How long to wait before each further try, until `seconds` have gone by since the first was asked for."""
    until, pause = time.monotonic() + seconds, FIRST
    while (left := until - time.monotonic()) > 0:
        yield min(jittered(pause), left)
        pause = min(2 * pause, LONGEST)
