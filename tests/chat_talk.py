"""`glm5 chat` over prepared lines: what a test types, who answers, and what the terminal then shows."""

import io

from rich.console import Console

from glm5.cli.chat_loop import ChatLoop
from glm5.cli.chat_source import ChatSettings, Piece


def lines_of(lines):
    """A `read` that gives these lines and then ends; an exception among them is raised."""
    rest = iter(lines)

    def read():
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


class Prepared:
    """A source that gives prepared pieces and notes what it was asked; an exception among them is raised."""

    name = "prepared"

    def __init__(self, *answers):
        self.answers, self.asked, self.settings, self.closed = list(answers), [], [], 0

    def stream(self, messages, settings):
        self.asked.append(messages)
        self.settings.append(settings)
        try:
            for piece in self.answers.pop(0) if self.answers else [Piece({"content": "ok"})]:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.closed += 1


def talk(source, lines, *, settings=None, system=None):
    """What the terminal shows, and the loop afterwards."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    loop = ChatLoop(source, settings or ChatSettings(max_tokens=60), console, lines_of(lines), system)
    assert loop.run() == 0
    return screen.getvalue(), loop
