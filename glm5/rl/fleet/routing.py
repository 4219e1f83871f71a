"""Which engine a session goes to: consistent hashing (Karger et al. 1997) with bounded loads (Mirrokni et al. 2018).

Every engine has `POINTS` places on a ring of 64-bit hashes; a session belongs to the first place behind its own hash.
So the turns of a session meet the same prefix cache, and when an engine leaves, only its own sessions move, each to
another neighbour. An engine that has more than its share of the running requests is passed over: a session that is
placed then stays where it was placed, until that engine leaves or is overloaded itself.

Members of a group (`glm5.engine.sessions`) begin with the same prompt, which is then computed once if one engine has
them all. They follow the first of them as long as that engine has less than `SIBLINGS` times its even share; what is
more goes where the ring sends the group next. Each keeps its own place for its later turns.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping

from glm5.engine.sessions import group_of

POINTS = 160
"""Places of an engine on the ring: the shares of few engines then differ by about a tenth."""
SLACK = 1.25
"""An engine takes new sessions while it has less than this many times its even share of the running requests."""
SIBLINGS = 2.0
"""The same for members of a group, where others of it are: a prompt that is computed once is worth some imbalance."""
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
        group = group_of(session)
        share = (sum(loads.values()) + 1) / len(loads)
        bound, at_home = math.ceil(SLACK * share), math.ceil((SLACK if session == group else SIBLINGS) * share)
        homes = [name for name in (self._homes.get(session), self._homes.get(group)) if name and name in loads]
        places = [name for name in homes if loads[name] < at_home]
        chosen = places[0] if places else self._elsewhere(group, loads, bound)
        self._remember(session, chosen)
        if self._homes.get(group) not in loads:
            self._remember(group, chosen)
        return chosen

    def _elsewhere(self, group: str, loads: Mapping[str, int], bound: int) -> str:
        """The first engine on the ring that is not overloaded."""
        return next(name for name in self.ring.order(group) if name in loads and loads[name] < bound)

    def _remember(self, session: str, engine: str) -> None:
        self._homes[session] = engine
        self._homes.move_to_end(session)
        if len(self._homes) > REMEMBERED:
            self._homes.popitem(last=False)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
