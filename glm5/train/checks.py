"""Checks of settings: a value that no run can use ends in one sentence before the run starts."""

from __future__ import annotations

import math
from typing import Any

from glm5.errors import ConfigError, did_you_mean


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """Raises ConfigError unless the fields called `names` are whole numbers of at least `least`."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


def check_numbers(config: Any, *names: str, above: float | None = None) -> None:
    """Raises ConfigError unless the fields are finite, and above `above`, or at least 0 when that is left out."""
    for name in names:
        value = getattr(config, name)
        finite = isinstance(value, int | float) and math.isfinite(value)
        if not finite or (value < 0 if above is None else value <= above):
            raise ConfigError(f"{name} is {value!r}; it must be {'at least 0' if above is None else f'above {above}'}.")


def check_choice(config: Any, name: str, *choices: str, value: Any = None) -> None:
    """Raises ConfigError unless the field, or `value` of it, is one of `choices`."""
    value = getattr(config, name) if value is None else value
    if value not in choices:
        known = " or ".join(map(repr, choices))
        raise ConfigError(f"{name} is {value!r}; use {known}.{did_you_mean(str(value), choices)}")
