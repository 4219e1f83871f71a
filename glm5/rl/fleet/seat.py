"""A place for an engine in a supervised fleet, and how often engines have failed there."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial

from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.member import Member
from glm5.rl.fleet.protocol import EngineState
from glm5.rl.outage import jittered

FIRST_DELAY, DOUBLINGS = 0.05, 7
"""Seconds before an engine is started again at most, and how often they double with each failure after the first."""
REFUSALS, AVOIDED_SECONDS = 3, 300.0
"""Requests in a row that an engine fails at while it takes others, and for how long such go elsewhere first then."""


@dataclass(eq=False)
class Seat:
    """Who sits there, if anybody."""

    name: str
    member: Member | None = None
    """An engine that is ready."""
    version: int = -1
    requests: int = 0
    restarts: int = 0
    failures: deque[float] = field(default_factory=deque)
    """When its engines died or did not come up, within the window."""
    failure: str = ""
    """The newest reason of one."""
    given_up: str | None = None
    """Why it stays empty."""
    refused: deque[int] = field(default_factory=partial(deque, maxlen=REFUSALS))
    """Tokens of the requests that its engine failed at while it took others, since it took one as large."""
    refused_at: float = 0.0
    """When it did so last."""

    def state(self) -> EngineState:
        """What a person wants to know."""
        stats = None if self.member is None else self.member.stats()
        return EngineState(self.name, self.member is not None, self.version, self.requests, self.restarts, stats)

    @property
    def tried(self) -> bool:
        """Whether an engine is there, or was or would have been, but for a failure."""
        return self.member is not None or bool(self.failure)

    def fails_at(self, tokens: int, now: float) -> None:
        """Its engine failed at a request of so many tokens, and takes others."""
        self.refused.append(tokens)
        self.refused_at = now

    def takes(self, tokens: int) -> None:
        """Its engine has taken a request of so many tokens."""
        for smaller in [refused for refused in self.refused if refused <= tokens]:
            self.refused.remove(smaller)

    def bears(self, tokens: int, now: float) -> bool:
        """Whether its engine is as good as any other for a request of so many tokens, as far as is known."""
        many, lately = len(self.refused) == REFUSALS, now - self.refused_at < AVOIDED_SECONDS
        return not (many and lately and tokens >= min(self.refused))

    def failed(self, reason: str, now: float, config: FleetConfig, *, final: bool) -> float | None:
        """Counts a failure; the seconds until the next try, or None when the seat is given up (at once if `final`)."""
        self.failures.append(now)
        self.failure = reason
        while now - self.failures[0] > max(config.restart_window, 2 * config.outage_seconds):
            self.failures.popleft()
        lasting = now - self.failures[0] >= config.outage_seconds
        if final or (len(self.failures) > config.max_restarts and lasting):
            tried = "" if final else f" ({len(self.failures)} times)"
            self.given_up = f"engine {self.name} failed{tried}: {reason}"
            return None
        self.restarts += 1
        return jittered(FIRST_DELAY * 2 ** min(len(self.failures) - 1, DOUBLINGS))
