"""A panic of a library in Rust (llguidance, tokenizers) becomes one request's refusal.

To Python it is a `pyo3_runtime.PanicException`, a class that cannot be imported and no `Exception`: what passes it by
would end every request of the engine, or a server's task.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from glm5.errors import InputError


@contextmanager
def panics_refused(what: str) -> Iterator[None]:
    """Around the work, or a function that does it. Raises InputError, for a panic."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: its library failed on it; simplify it.") from error
