"""Fleets for `train_rl(make_fleet=...)`: where the engines of a run are.

    train_rl(config, environments, directory, make_fleet=processes(partial(glm5.Engine, parent), size=2))

What `processes` and `ray_actors` give is called with the learner's model and version; engines are built by `build` in
their own processes and take the learner's weights when those are newer than what they were built with.
"""

from __future__ import annotations

from collections.abc import Callable

from glm5.model import GLM5
from glm5.rl.fleet.config import FleetConfig
from glm5.rl.fleet.member import Executor
from glm5.rl.fleet.processes import ProcessExecutor
from glm5.rl.fleet.supervisor import SupervisedFleet
from glm5.rl.fleet.worker import Build
from glm5.text import Tokenizer

MakeSupervised = Callable[[GLM5, Tokenizer, int], SupervisedFleet]


def supervised(make_executor: Callable[[], Executor], size: int, config: FleetConfig | None = None) -> MakeSupervised:
    """`size` engines of any executor."""

    def make(model: GLM5, tokenizer: Tokenizer, version: int) -> SupervisedFleet:
        weights = (version, model.state_dict())
        return SupervisedFleet(make_executor(), size, tokenizer=tokenizer, config=config, weights=weights)

    return make


def processes(
    build: Build, size: int, *, recompute: bool | None = None, threads: int = 1, config: FleetConfig | None = None
) -> MakeSupervised:
    """`size` engines in processes of this machine."""
    return supervised(lambda: ProcessExecutor(build, recompute=recompute, threads=threads), size, config)


def ray_actors(
    build: Build, size: int, *, recompute: bool | None = None, threads: int = 1, num_cpus: float = 1.0,
    num_gpus: float = 0.0, config: FleetConfig | None = None,
) -> MakeSupervised:  # fmt: skip
    """`size` engines on the cluster that `ray.init` has connected to. Raises `InputError` without the package ray."""
    from glm5.rl.fleet.ray import RayExecutor

    return supervised(
        lambda: RayExecutor(build, recompute=recompute, threads=threads, num_cpus=num_cpus, num_gpus=num_gpus),
        size,
        config,
    )
