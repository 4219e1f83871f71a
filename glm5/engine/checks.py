"""Settings of a request or an engine that cannot be used, each refused with a sentence (`InputError`).

NumPy's numbers are as good as Python's, which they become. A bool is no number.
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Iterable
from typing import Any

from glm5.errors import InputError

LARGEST = sys.float_info.max


def as_whole(value: Any) -> int | None:
    """The value as an int, if it is a whole number of any type."""
    if type(value) is int:
        return value
    return operator.index(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int; refuses anything but a whole number in [low, high]. None leaves the upper end open."""
    whole = as_whole(value)
    if whole is None or whole < low or (high is not None and whole > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} is {value!r}; it must be a whole number {bounds}.")
    return whole


def check_number(name: str, value: Any, low: float, high: float = LARGEST, *, above: bool = False) -> float:
    """The value as an int or float; refuses all but a finite number in [low, high], with `above` in (low, high]."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number: float = value if type(value) is int or not real else float(value)
    if not real or not low <= number <= high or (above and number == low):  # NaN is in no interval
        lower = f"above {low:g}" if above else f"at least {low:g}"
        upper = "" if high == LARGEST else f" and at most {high:g}"
        raise InputError(f"{name} is {value!r}; it must be a number {lower}{upper}.")
    return number


def as_tuple(name: str, value: Any, entries: str) -> tuple[Any, ...]:
    """The entries of a list, or of whatever else can be iterated but a text."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {value!r}; give a list of {entries}.")
    return tuple(value)
