"""What a supervised fleet asks of an engine somewhere else, and of whoever can start one there.

Calls return at once and may come from any thread; what an engine has to say comes back through `Events`.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from glm5.engine import EngineStats
from glm5.engine.admission import Limits
from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.job import Delivery, Order


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine says of itself when it is ready."""

    version: int
    limits: Limits
    shapes: Mapping[str, tuple[int, ...]] | None
    """Of its weights, by name; None where they are not known."""


class Events(Protocol):
    """The fleet's side. What comes from an engine that was given up does no harm."""

    def delivered(self, member: Member, deliveries: list[Delivery]) -> None:
        """New tokens."""

    def ended(self, member: Member, number: int, error: BaseException | None) -> None:
        """Nothing more will come of a request."""

    def lost(self, member: Member, reason: str) -> None:
        """The engine is gone, or is to be replaced."""


class Member(Protocol):
    """One engine."""

    facts: Facts
    """Known when it is ready."""

    def wait(self) -> None:
        """Returns when it is ready; `close`, from another thread, ends the wait.

        Raises `FleetError` when it does not come up (another try may help) and the engine's own `GLM5Error` when it
        refuses what it was given (no other try will).
        """

    def begin(self, order: Order) -> None:
        """Starts a request."""

    def abort(self, number: int) -> None:
        """Ends a request, of which nothing is wanted any more."""

    def update(self, version: int) -> Future[int]:
        """Takes the newest weights that the executor has; gives the version that it then has.

        The future's errors: `GLM5Error` for weights that it refuses. It may never be done: the engine may be gone.
        """

    def trouble(self, stood_still: float) -> str | None:
        """Why it must be replaced, or None. Asked several times a second.

        stood_still: seconds since the last time in which this program could hear nobody, being stopped itself.
        """

    def stats(self) -> EngineStats | None:
        """As it last said."""

    def close(self, *, kill: bool) -> None:
        """Ends it, and returns when it is gone. kill: without asking it first."""


class Executor(Protocol):
    """Where engines run."""

    outlived: bool
    """Whether its engines go on when the fleet is closed."""

    def launch(self, name: str, events: Events, config: FleetConfig) -> Member:
        """Starts an engine, which is still to be waited for. Raises `FleetError` when that cannot be done now."""

    def snapshot(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps weights for `Member.update`; `tensors` may change afterwards."""

    def close(self) -> None:
        """Lets go what the executor itself holds, and ends launches. All engines that it gave have ended."""
