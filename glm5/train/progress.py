"""The bar of a long run, and the ways in which a user stops one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from glm5.errors import RunError


class RunInterrupted(RunError):
    """The user stopped a run; it is saved and can go on.

    saved: a sentence on where it stands. how: one on how it goes on.
    """

    exit_status = 130

    def __init__(self, saved: str, how: str = "Run the same command with --resume to go on.") -> None:
        super().__init__(f"{saved} {how}")
        self.saved = saved


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C (or a termination signal) came; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def note(number: int, frame: object) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bar(
    name: str, first: int, steps: int, console: Console | None
) -> Iterator[Callable[[int, str, float], None]]:
    """A bar with a text, speed and time left; gives the function that moves it to (step, text, tokens per second)."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[state]}"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with bar:
        task: TaskID = bar.add_task(name, total=steps, completed=first, state="")

        def show(step: int, text: str, speed: float) -> None:
            bar.update(task, completed=step, state=f"{text}  {speed:,.0f} tokens/s")

        yield show
