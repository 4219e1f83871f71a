"""Errors that a user can cause. Each carries one sentence that names the thing and says what to do.

Programming mistakes raise Python's own exceptions; they are not listed here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GLM5Error(Exception):
    """Base of every error that a user can cause; the command line prints it without a traceback."""

    exit_status = 1
    """Of the command that ends with it."""


class ConfigError(GLM5Error):
    """A model configuration or preset that cannot be built."""


class InputError(GLM5Error):
    """Tensors, prompts or options that a call cannot accept."""


class CheckpointError(GLM5Error):
    """A checkpoint that is missing, damaged or does not fit the model."""


class TextError(GLM5Error):
    """A tokenizer, chat message or template that cannot be used."""


class DataError(GLM5Error):
    """A corpus, shard or manifest that cannot be built or read."""


class RunError(GLM5Error):
    """A run directory that cannot be started, resumed or read."""


class WeightsError(GLM5Error):
    """Published weights that are damaged, out of order or of another model."""


class FleetError(GLM5Error):
    """Engines that cannot be started, reached or kept alive."""


class RequestFailed(FleetError):
    """One request that engines fail at, however often it is tried, while they do others: whose it was goes without."""


class UnavailableError(GLM5Error):
    """A part of the server's own that cannot work now, through no fault of the request."""


class ParallelError(GLM5Error):
    """A process of a group that failed, so that the others cannot go on."""


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, or an empty string when none is as similar as `cutoff`."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
