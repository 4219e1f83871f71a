"""Where the engines of `glm5 rl` are: in this process, or in processes of their own."""

from __future__ import annotations

import functools
from typing import Literal

from glm5.engine import Engine
from glm5.model import GLM5
from glm5.rl.config import RLRunConfig
from glm5.rl.fleet import Fleet, ProcessExecutor, SupervisedFleet
from glm5.rl.orchestrator import MakeFleet
from glm5.text import Tokenizer
from glm5.train.run_directory import model_of

Executor = Literal["local", "processes"]


def fleet_of(config: RLRunConfig, executor: Executor, engines: int) -> MakeFleet | None:
    """None: the orchestrator's own choice, one engine in this process."""
    if executor == "local":
        return None

    def make(model: GLM5, tokenizer: Tokenizer, version: int) -> Fleet:
        # The engines load the run's first weights; the orchestrator publishes newer ones when it goes on.
        build = functools.partial(Engine, str(model_of(config.parent)), attention=config.learner.attention)
        return SupervisedFleet(ProcessExecutor(build), engines, tokenizer=tokenizer)

    return make
