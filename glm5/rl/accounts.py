"""The accounts of a run: every sample ends as exactly one of trained, dropped (with its reason), requeued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from glm5.rl.records import Fate, Ticket


class Entry(NamedTuple):
    """Samples are counted by these."""

    environment: str
    fate: Fate
    reason: str
    """Empty for trained."""


class Accounts:
    """Samples that were begun, each settled once. `begun` is always the sum of those open and those settled."""

    def __init__(self) -> None:
        self.begun = 0
        self.open: set[str] = set()
        """Ids of samples without a fate."""
        self.settled: Counter[Entry] = Counter()

    def begin(self, ticket: Ticket) -> None:
        """A sample is to be made."""
        if ticket.id in self.open:
            raise RuntimeError(f"sample {ticket.id} was begun twice")
        self.open.add(ticket.id)
        self.begun += 1

    def settle(self, ticket: Ticket, fate: Fate, reason: str = "") -> None:
        """A sample ends. Refuses one that was not begun, or that has ended already."""
        if ticket.id not in self.open:
            raise RuntimeError(f"sample {ticket.id} is not open, so it cannot be {fate}")
        self.open.remove(ticket.id)
        self.settled[Entry(ticket.environment, fate, reason)] += 1

    def metrics(self, environments: Iterable[str] = ()) -> dict[str, Any]:
        """Totals of the run, of `environments` if given; `sampled` is the sum of the others.

        Two of them, taken a step apart, differ by what happened in the step.
        """
        chosen = set(environments)
        counts: dict[Fate, Counter[str]] = {"trained": Counter(), "requeued": Counter(), "dropped": Counter()}
        for entry, count in sorted(self.settled.items()):
            if not chosen or entry.environment in chosen:
                counts[entry.fate][entry.reason] += count
        return {
            "sampled": sum(counter.total() for counter in counts.values()),
            "trained": counts["trained"].total(),
            "requeued": dict(counts["requeued"]),
            "dropped": dict(counts["dropped"]),
        }

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"begun": self.begun, "open": sorted(self.open),
                "settled": [[*entry, count] for entry, count in sorted(self.settled.items())]}  # fmt: skip

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Accounts:
        """The accounts that `state` was taken of."""
        accounts = cls()
        accounts.begun, accounts.open = state["begun"], set(state["open"])
        accounts.settled.update({Entry(*entry): count for *entry, count in state["settled"]})
        return accounts
