"""Between a run and its live view: keeps the newest snapshot, and does not draw more often than an eye can follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from glm5.rl.admission import SchedulerConfig
from glm5.rl.fleet import EngineState
from glm5.rl.view.live import LiveView
from glm5.rl.view.snapshot import Snapshot
from glm5.train import RunDirectory
from glm5.train.watch import Write

EVERY = 0.5
"""Seconds between two glances that are drawn."""
WRITTEN, QUIET = ("run.json", "journal", "metrics.jsonl"), 60.0
"""Files of a run that is made, and seconds without a word in them that are told: a long step has as many."""
LONGEST = 300
"""Characters of the reason of a failure."""


class Watch:
    """`show`: of a `LiveView`, or any function of a snapshot. `write`: takes the numbers of a step elsewhere."""

    def __init__(self, show: Callable[[Snapshot], None], snapshot: Snapshot, write: Write | None = None) -> None:
        self._show, self._snapshot, self._write = show, snapshot, write
        self._due = 0.0

    def learnt(self, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """A step was taken: its lines of `metrics` and `speed`."""
        self._snapshot = replace(self._snapshot.after(metrics, speed), note="")
        self._show(self._snapshot)
        if self._write is not None:
            self._write(metrics["step"], {**metrics, **{f"speed/{name}": value for name, value in speed.items()}})

    def glance(self, running: int, queue: int, engines: Callable[[], Sequence[EngineState]]) -> None:
        """Between two steps; most calls draw nothing."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + EVERY
        self._snapshot = replace(self._snapshot, running=running, queue=queue, engines=tuple(engines()))
        self._show(self._snapshot)

    def note(self, text: str) -> None:
        """Something that a person should know, if anything; it stays until the next step."""
        if text and text != self._snapshot.note:
            self._snapshot = replace(self._snapshot, note=text)
            self._show(self._snapshot)

    def failed(self, reason: str) -> None:
        """A rollout failed: the first one since the last step is noted, for a log holds a line for every note."""
        if not self._snapshot.note:
            line = " ".join(reason.split())
            self.note(line if len(line) <= LONGEST else line[:LONGEST] + "...")


def snapshot_of(run: RunDirectory) -> Snapshot:
    """A run as its directory tells it."""
    config = run.description["config"]
    snapshot = Snapshot(name=run.path.name, steps=config["steps"])
    if "scheduler" in config:
        scheduler = SchedulerConfig(**config["scheduler"])
        snapshot = replace(
            snapshot,
            mode=scheduler.mode,
            groups_per_batch=scheduler.groups_per_batch,
            staleness_bound=scheduler.bound,
        )
    speed = {line["step"]: line for line in run.read("speed")}
    for metrics in run.read("metrics"):
        snapshot = snapshot.after(metrics, speed.get(metrics["step"], {}))
    return snapshot


def watch_run(run_directory: Path, console: Console | None = None, *, every: float = 1.0) -> None:
    """Shows a run that another process makes, until it is finished; looks every so many seconds.

    A run that writes nothing any more may have been stopped or killed: the view says since when.
    """
    with LiveView(console) as view:
        while True:
            run = RunDirectory.open(run_directory)
            finished = run.finished
            view.show(snapshot_of(run) if finished else replace(snapshot_of(run), note=_quiet(run)))
            if finished:
                return
            time.sleep(every)


def _quiet(run: RunDirectory) -> str:
    """Since when a run has written nothing; empty for one that does."""
    files = [path for path in map(run.path.joinpath, WRITTEN) if path.exists()]
    last = max(path.stat().st_mtime for path in files)
    if time.time() - last < QUIET:
        return ""
    at = time.strftime("%H:%M on %d %B", time.localtime(last))
    return f"nothing was written since {at}; if the run was stopped, `glm5 rl --resume --out {run.path}` goes on"
