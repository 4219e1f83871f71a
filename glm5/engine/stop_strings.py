"""Stop strings over a stream of text pieces: text goes out as soon as it cannot belong to a stop string."""

from __future__ import annotations


class StopStrings:
    """Cuts a stream at the first stop string; any split of the text into pieces gives the same result."""

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self.stops = stops
        self.include = include
        self.held = ""

    def feed(self, piece: str) -> tuple[str, str | None]:
        """(text that is certain now, the stop string that was met or None)."""
        text = self.held + piece
        # The match that ends first wins (of two that end together, the longer), whatever the pieces were.
        found = min(
            ((text.find(stop) + len(stop), -len(stop), stop) for stop in self.stops if stop in text), default=None
        )
        if found is not None:
            end, _, stop = found
            start = end - len(stop)
            self.held = ""
            return text[: start + len(stop) if self.include else start], stop
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None

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
