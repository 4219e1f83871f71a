"""Settings of a request or an engine that cannot be used, each refused with a sentence (`InputError`)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from glm5.errors import InputError

LARGEST = sys.float_info.max


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuses anything but an int in [low, high]; None leaves the upper end open."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} is {value!r}; it must be a whole number {bounds}.")


def check_number(name: str, value: Any, low: float, high: float = LARGEST, *, above: bool = False) -> None:
    """Refuses anything but a finite number in [low, high], or in (low, high] with `above`."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not low <= value <= high or (above and value == low):  # NaN is in no interval
        lower = f"above {low:g}" if above else f"at least {low:g}"
        upper = "" if high == LARGEST else f" and at most {high:g}"
        raise InputError(f"{name} is {value!r}; it must be a number {lower}{upper}.")


def as_tuple(name: str, value: Any, entries: str) -> tuple[Any, ...]:
    """The entries of a list, or of whatever else can be iterated but a text."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {value!r}; give a list of {entries}.")
    return tuple(value)
