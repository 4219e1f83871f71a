"""Which engine a session goes to: consistent hashing (Karger et al. 1997) with bounded loads (Mirrokni et al. 2018).

Every engine has `POINTS` places on a ring of 64-bit hashes; a session belongs to the first place behind its own hash.
So the turns of a session meet the same prefix cache, and when an engine leaves, only its own sessions move, each to
another neighbour. An engine that has more than its share of the running requests is passed over: a session that is
placed then stays where it was placed, until that engine leaves or is overloaded itself.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping

POINTS = 160
"""Places of an engine on the ring: the shares of few engines then differ by about a tenth."""
SLACK = 1.25
"""An engine takes new sessions while it has less than this many times its even share of the running requests."""
REMEMBERED = 65536
"""Sessions whose place is remembered; the longest unused are forgotten first."""


class Ring:
    """The places of the engines; a pure function of their names."""

    def __init__(self) -> None:
        self._points: list[tuple[int, str]] = []

    def add(self, name: str) -> None:
        """An engine joins."""
        for number in range(POINTS):
            bisect.insort(self._points, (_hash(f"{name}#{number}"), name))

    def remove(self, name: str) -> None:
        """An engine leaves; one that is not here does no harm."""
        self._points = [point for point in self._points if point[1] != name]

    def order(self, session: str) -> list[str]:
        """All engines in the order in which the session prefers them."""
        first = bisect.bisect(self._points, (_hash(session), ""))
        return list(dict.fromkeys(name for _, name in [*self._points[first:], *self._points[:first]]))


class Router:
    """Chooses the engine of each request. Not thread-safe."""

    def __init__(self) -> None:
        self.ring = Ring()
        self._homes: OrderedDict[str, str] = OrderedDict()

    def choose(self, session: str | None, loads: Mapping[str, int]) -> str:
        """The engine for a request; `loads`: running requests of the engines that can take one, at least one engine.

        Requests without a session go to the engine with the least to do.
        """
        if session is None:
            return min(loads, key=lambda name: (loads[name], name))
        bound = math.ceil(SLACK * (sum(loads.values()) + 1) / len(loads))
        home = self._homes.get(session)
        order = [home, *self.ring.order(session)] if home is not None else self.ring.order(session)
        chosen = next(name for name in order if name in loads and loads[name] < bound)
        self._homes[session] = chosen
        self._homes.move_to_end(session)
        if len(self._homes) > REMEMBERED:
            self._homes.popitem(last=False)
        return chosen


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
