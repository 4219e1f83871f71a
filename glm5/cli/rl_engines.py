"""Where the engines of `glm5 rl` are: in this process, in processes of their own, or on a Ray cluster."""

from __future__ import annotations

from typing import Literal

from glm5.rl.config import RLRunConfig
from glm5.rl.executors import MakeFleet, engine_actors, engine_processes

Executor = Literal["local", "processes", "ray"]


def fleet_of(config: RLRunConfig, executor: Executor, engines: int, cluster: str | None) -> MakeFleet | None:
    """None: the orchestrator's own choice, one engine in this process. cluster: Ray's address; None starts one here."""
    if executor == "local":
        return None
    if executor == "processes":
        return engine_processes(config, engines)
    make = engine_actors(config, engines)  # refuses when ray is missing
    import ray

    ray.init(cluster, log_to_driver=False)
    return make
