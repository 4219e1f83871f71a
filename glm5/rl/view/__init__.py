"""Seeing a run: the live view in a terminal, and the page of its rollouts."""

from glm5.rl.view.history import History, Told, told
from glm5.rl.view.live import LiveView, render
from glm5.rl.view.of_run import view_run
from glm5.rl.view.snapshot import Snapshot
from glm5.rl.view.trainer import trainer_logprobs
from glm5.rl.view.viewer import write_viewer

__all__ = ["History", "LiveView", "Snapshot", "Told", "render", "told", "trainer_logprobs", "view_run", "write_viewer"]
