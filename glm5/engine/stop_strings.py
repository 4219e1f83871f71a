"""Stop strings over a stream of text pieces: text goes out as soon as it cannot belong to a stop string."""

from __future__ import annotations


class StopStrings:
    """Cuts a stream at the first stop string; any split of the text into pieces gives the same result."""

    def __init__(self, stops: tuple[str, ...], *, include: bool = False, begin: tuple[str, ...] = ()) -> None:
        """begin: stop strings are looked for from the first of these texts on, in which one may begin too."""
        self.stops = stops
        self.include = include
        self.held = ""
        self._awaited = begin if stops else ()

    def feed(self, piece: str) -> tuple[str, str | None]:
        """(text that is certain now, the stop string that was met or None)."""
        passed, text = self._begun(self.held + piece)
        if self._awaited:
            self.held = text
            return passed, None
        # The match that ends first wins (of two that end together, the longer), whatever the pieces were.
        found = min(
            ((text.find(stop) + len(stop), -len(stop), stop) for stop in self.stops if stop in text), default=None
        )
        if found is not None:
            end, _, stop = found
            start = end - len(stop)
            self.held = ""
            return passed + text[: start + len(stop) if self.include else start], stop
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return passed + text[: len(text) - keep], None

    def skip(self, piece: str) -> str:
        """The text that is certain now of a piece in which none is looked for."""
        passed, text = self._begun(self.held + piece)
        self.held = text if self._awaited else ""
        return passed if self._awaited else passed + text

    def _begun(self, text: str) -> tuple[str, str]:
        """The text before the place from which on stop strings are looked for, or that may be before it, and the
        rest."""
        if not self._awaited:
            return "", text
        ends = [(text.find(one) + len(one), -len(one)) for one in self._awaited if one in text]
        if ends:
            place = sum(min(ends))  # of the one that ends first, whatever the pieces were
            self._awaited = ()
            return text[:place], text[place:]
        keep = max(_overlap(text, one) for one in self._awaited)
        return text[: len(text) - keep], text[len(text) - keep :]

    def finish(self) -> str:
        """The text still held back, when the stream ends for another reason."""
        rest, self.held = self.held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
