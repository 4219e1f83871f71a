"""The user's side of `glm5 chat`: a line editor with history and several lines; plain lines when input is a pipe."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

MORE = ". "
UNDECODED = re.compile("[\ud800-\udfff]")
"""How Python keeps bytes of a terminal that are not UTF-8."""


def reader(commands: Iterable[str]) -> Callable[[], str]:
    """A function that gives the next text and raises `EOFError` at the end, `KeyboardInterrupt` for Ctrl-C."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the locale says; a byte that is wrong ends nothing
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        return _from_pipe
    return _editor(commands)


def _from_pipe() -> str:
    try:
        return continued(input)
    except KeyboardInterrupt:  # nobody sits there to be asked again
        raise EOFError from None


def continued(read: Callable[[], str]) -> str:
    """One text from lines: a backslash at the end of a line takes the next one too."""
    lines = [read()]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read())
        except EOFError:
            break
    return "\n".join(lines)


def history_file() -> Path:
    """Where earlier inputs are kept: `glm5/chat-history` in the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "glm5" / "chat-history"


def _editor(commands: Iterable[str]) -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.formatted_text import HTML
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            if UNDECODED.search(buffer.text):
                buffer.text = UNDECODED.sub("\N{REPLACEMENT CHARACTER}", buffer.text)
            buffer.validate_and_handle()

    history: History = InMemoryHistory()
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(str(path))
    except OSError:
        pass  # a read-only home: the history lasts as long as the conversation
    completer = WordCompleter([f"/{name}" for name in sorted(commands)], sentence=True)
    session: PromptSession[str] = PromptSession(
        HTML("<b>&gt;</b> "), history=history, completer=completer, complete_while_typing=False, key_bindings=keys,
        multiline=True, prompt_continuation=lambda *_: MORE, enable_open_in_editor=True,
    )  # fmt: skip
    return session.prompt
