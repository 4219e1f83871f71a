"""Where the engines of a run are: functions for `train_rl(make_fleet=)`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from glm5.engine import Engine
from glm5.model import GLM5
from glm5.rl.config import RLRunConfig
from glm5.rl.fleet import Fleet, FleetConfig, InProcessFleet, ProcessExecutor, SupervisedFleet
from glm5.text import Tokenizer
from glm5.train.run_directory import model_of

MakeFleet = Callable[[GLM5, Tokenizer, int], Fleet]
"""Engines for a model and its version. A fleet may begin with other weights of an earlier version: it gets these."""


def one_engine(config: RLRunConfig, **engine: Any) -> MakeFleet:
    """One engine in this process. engine: settings of `Engine`."""

    def make(model: GLM5, tokenizer: Tokenizer, version: int) -> Fleet:
        settings = {"attention": config.learner.attention, "max_num_seqs": config.scheduler.max_running, **engine}
        return InProcessFleet([Engine(copy.deepcopy(model), tokenizer, version=version, **settings)])

    return make


def engine_processes(
    config: RLRunConfig, count: int, *, threads: int = 1, limits: FleetConfig | None = None, **engine: Any
) -> MakeFleet:
    """So many engines in processes of their own, which are replaced when they die; each loads the parent first.

    threads: torch's, of each. limits: when an engine counts as dead. engine: settings of `Engine`. A script that uses
    this does so under `if __name__ == "__main__":`. Full weights only: adapters need engines that have them.
    """
    settings = {"attention": config.learner.attention, "max_num_seqs": config.scheduler.max_running, **engine}
    build = partial(Engine, model_of(config.parent), **settings)

    def make(model: GLM5, tokenizer: Tokenizer, version: int) -> Fleet:
        return SupervisedFleet(ProcessExecutor(build, threads=threads), count, tokenizer=tokenizer, config=limits)

    return make
