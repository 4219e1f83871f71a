"""A source of tokens around another one: what it is stays the other's."""

from __future__ import annotations

from typing import Generic, TypeVar

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
