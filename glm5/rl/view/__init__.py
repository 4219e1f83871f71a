"""Seeing a run: the live view in a terminal, and the page of its rollouts."""

from glm5.rl.view.history import History, Told, told
from glm5.rl.view.live import LiveView, render
from glm5.rl.view.of_run import view_run
from glm5.rl.view.snapshot import Snapshot
from glm5.rl.view.trainer import trainer_logprobs
from glm5.rl.view.viewer import write_viewer
from glm5.rl.view.watch import snapshot_of, watch_run

__all__ = [
    "History", "LiveView", "Snapshot", "Told", "render", "snapshot_of", "told", "trainer_logprobs", "view_run",
    "watch_run", "write_viewer",
]  # fmt: skip
