"""Where the engines of `glm5 rl` are: in this process, or in processes of their own."""

from __future__ import annotations

from typing import Literal

from glm5.rl.config import RLRunConfig
from glm5.rl.executors import MakeFleet, engine_processes

Executor = Literal["local", "processes"]


def fleet_of(config: RLRunConfig, executor: Executor, engines: int) -> MakeFleet | None:
    """None: the orchestrator's own choice, one engine in this process."""
    return None if executor == "local" else engine_processes(config, engines)
