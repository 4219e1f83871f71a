"""The limits of a supervised fleet: how long it waits for what, and how often it tries."""

from __future__ import annotations

from dataclasses import dataclass

from glm5.train.checks import check_counts, check_numbers


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Times in seconds. Raises `ConfigError`."""

    start_seconds: float = 600.0
    """For an engine to load its weights and be ready; it is not watched before that."""
    silence_seconds: float = 30.0
    """Without any sign of life from an engine. Signs come from a thread of their own, also during a long step."""
    stuck_seconds: float = 600.0
    """Without a finished step while an engine has requests: longer than the longest step."""
    update_seconds: float = 300.0
    """For an engine to take new weights."""
    max_restarts: int = 5
    """Failures of one seat within the window after which it stays empty."""
    restart_window: float = 600.0
    max_moves: int = 3
    """Times that a request goes on elsewhere: what kills every engine must not kill all of them."""

    outage_seconds: float = 0.0
    """How long an engine may fail, or a request find none that takes it, at least before either is given up by the
    counts above: for servers that somebody else starts anew, which are away for longer than a few tries take."""

    def __post_init__(self) -> None:
        check_numbers(self, "start_seconds", "silence_seconds", "stuck_seconds", "update_seconds", above=0)
        check_numbers(self, "restart_window", above=0)
        check_numbers(self, "outage_seconds")
        check_counts(self, "max_restarts", "max_moves", least=0)
