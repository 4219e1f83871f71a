"""All stages by name, and the way back from a run directory to the job that made it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from glm5.config import ModelConfig
from glm5.errors import RunError
from glm5.parallel import ParallelPlan
from glm5.train.dsa import DSAConfig, dsa_job
from glm5.train.job import Job
from glm5.train.midtrain import MidtrainConfig, midtrain_job
from glm5.train.pretrain import PretrainConfig, pretrain_job
from glm5.train.run_directory import RunDirectory
from glm5.train.sft import SFTConfig, sft_job
from glm5.train.sparse import SparseConfig, sparse_job

AnyConfig = PretrainConfig | MidtrainConfig | DSAConfig | SparseConfig | SFTConfig

CONFIGS: dict[str, type[Any]] = {
    "pretrain": PretrainConfig,
    "midtrain": MidtrainConfig,
    "dsa1": DSAConfig,
    "dsa2": SparseConfig,
    "sft": SFTConfig,
}
"""In the order of the recipe."""
JOBS: dict[type[Any], Callable[[Any], Job]] = {
    PretrainConfig: pretrain_job,
    MidtrainConfig: midtrain_job,
    DSAConfig: dsa_job,
    SparseConfig: sparse_job,
    SFTConfig: sft_job,
}


def job_of(config: AnyConfig) -> Job:
    """The job of a configuration: its inputs are opened and hashed."""
    return JOBS[type(config)](config)


def config_of(run: RunDirectory) -> AnyConfig:
    """The configuration in a run's `run.json`, for one process: a parallel plan belongs to a session, not to the run.

    Raises RunError for a run of another kind or version.
    """
    stage, values = run.description.get("stage"), dict(run.description.get("config") or {})
    if stage not in CONFIGS:
        raise RunError(f"{run.path} is a run of {stage!r}; `glm5 train` knows {', '.join(CONFIGS)}.")
    if "model" in values:
        values["model"] = ModelConfig.from_dict(values["model"])
    try:
        config: AnyConfig = TypeAdapter(CONFIGS[stage]).validate_python(values)
        return with_plan(config, ParallelPlan())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{run.path / 'run.json'} has a {where} that cannot be read: {first['msg']}.") from error


def with_plan(config: AnyConfig, plan: ParallelPlan) -> AnyConfig:
    """The same stage under another parallel plan."""
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, parallel=plan))


def shortened(config: AnyConfig, steps: int) -> AnyConfig:
    """The same stage in about `steps` steps, at least one in each phase; for proofs and tests."""
    loop = dataclasses.replace(config.loop, steps=steps)
    if isinstance(config, MidtrainConfig):
        each = max(1, steps // len(config.phases))
        phases = tuple(dataclasses.replace(phase, steps=each) for phase in config.phases)
        return dataclasses.replace(config, phases=phases, loop=dataclasses.replace(loop, steps=each * len(phases)))
    return dataclasses.replace(config, loop=loop)
