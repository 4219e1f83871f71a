"""Engines as one source of tokens: in this process, in processes of their own, on a Ray cluster, or other servers."""

from glm5.rl.fleet.local import InProcessFleet
from glm5.rl.fleet.protocol import EngineState, Fleet, FleetStats

__all__ = ["EngineState", "Fleet", "FleetStats", "InProcessFleet"]
