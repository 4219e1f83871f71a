"""How much a request may ask of those who read its schemas: a few kilobytes of references and lists multiply out into
millions of values, and each reader counts what it is about to make before it makes it."""

from __future__ import annotations

from glm5.errors import InputError

MOST = 1 << 20
"""Characters read or written, over all the schemas of a request; a grammar may have a quarter of them."""
EACH = 16
"""What a part of a schema costs beside its text."""


class Budget:
    """What is left. where: whose schema is read, for the sentence of a refusal."""

    def __init__(self, where: str, most: int = MOST) -> None:
        self.where = where
        self._left = most

    def spend(self, characters: int) -> None:
        """Raises `InputError` when all is spent."""
        self._left -= characters
        if self._left < 0:
            raise InputError(f"{self.where} has a schema that multiplies out to too much; send a smaller one.")
