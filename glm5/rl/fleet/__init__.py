"""Engines as one source of tokens: in this process, in processes of their own, on a Ray cluster, or other servers."""

from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.local import InProcessFleet
from glm5.rl.fleet.processes import ProcessExecutor
from glm5.rl.fleet.protocol import EngineState, Fleet, FleetStats
from glm5.rl.fleet.supervisor import SupervisedFleet

__all__ = [
    "EngineState", "Fleet", "FleetConfig", "FleetStats", "InProcessFleet", "ProcessExecutor", "SupervisedFleet",
]  # fmt: skip
