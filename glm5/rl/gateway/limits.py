"""What a gateway keeps of its sessions at most."""

from __future__ import annotations

from dataclasses import dataclass

from glm5.train.checks import check_counts, check_numbers


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """What one gateway keeps."""

    max_open: int = 1024
    """Open sessions; a request that would open one more is answered with 429."""
    max_tokens: int = 2_000_000
    """Recorded tokens of one session; past them it takes no more requests."""
    idle_hours: float = 7 * 24.0
    """A session of which nothing was heard for so long is closed."""

    def __post_init__(self) -> None:
        check_counts(self, "max_open", "max_tokens")
        check_numbers(self, "idle_hours", above=0)
