"""A source of tokens around another one: what it is stays the other's, also what only some sources have."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from glm5.serve.generation import Source
from glm5.text import Tokenizer

Inner = TypeVar("Inner", bound=Source)


class AroundSource(Generic[Inner]):
    """The base of sources that change or watch the requests of `source`; they add `stream`."""

    def __init__(self, source: Inner) -> None:
        self.source = source

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The source's."""
        return self.source.tokenizer

    @property
    def max_model_len(self) -> int:
        """The source's."""
        return self.source.max_model_len

    @property
    def version(self) -> int:
        """Of the source's weights."""
        return self.source.version

    # What a server asks of a source that has it (`glm5.serve`); None where the other one has not.
    @property
    def grammars(self) -> Any:
        """Where structures are compiled before their requests start."""
        return getattr(self.source, "grammars", None)

    @property
    def ready(self) -> Callable[[], Awaitable[bool]] | None:
        """Whether it can answer."""
        return getattr(self.source, "ready", None)

    @property
    def failure(self) -> str | None:
        """Why it answers nothing any more."""
        return getattr(self.source, "failure", None)

    @property
    def stats(self) -> Any:
        """What it does."""
        return getattr(self.source, "stats", None)
