"""Where the engines of a run are: functions for `train_rl(make_fleet=)`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from httpx import AsyncBaseTransport

from glm5.checkpoint import load_model
from glm5.engine import Engine
from glm5.errors import ConfigError
from glm5.model import GLM5
from glm5.rl.adapters import LoRA, adapt, engine_model
from glm5.rl.config import RLRunConfig
from glm5.rl.fleet import Fleet, FleetConfig, InProcessFleet, ProcessExecutor, SupervisedFleet
from glm5.rl.fleet.delivery import Polled, Reloaded
from glm5.rl.fleet.external import ServerExecutor
from glm5.rl.weights import DirectoryPublisher
from glm5.rl.weights.mirror import claim
from glm5.serve.backend import Backend
from glm5.serve.backend_api import backend_api
from glm5.text import Tokenizer
from glm5.train import RunDirectory
from glm5.train.run_directory import model_of

BLOCK = 16
"""Tokens of a block of the engines' caches. The samples of a task share whole blocks of its prompt, which is short."""
MakeFleet = Callable[[GLM5, Tokenizer, int], Fleet]
"""Engines for a model and its version. A fleet may begin with other weights of an earlier version: it gets these."""


def one_engine(config: RLRunConfig, **engine: Any) -> MakeFleet:
    """One engine in this process. engine: settings of `Engine`; its blocks are of `BLOCK` tokens otherwise."""

    def make(model: GLM5, tokenizer: Tokenizer, version: int) -> Fleet:
        settings = {**engine_settings(config), **engine}
        engines = [Engine(copy.deepcopy(model), tokenizer, version=version, **settings)]
        return InProcessFleet(engines, recompute=config.recompute)

    return make


def engine_processes(
    config: RLRunConfig, count: int, *, threads: int = 1, limits: FleetConfig | None = None, **engine: Any
) -> MakeFleet:
    """So many engines in processes of their own, which are replaced when they die; each loads the parent first.

    threads: torch's, of each. limits: when an engine counts as dead. engine: settings of `Engine`. A script that uses
    this does so under `if __name__ == "__main__":`.
    """
    build = _build(config, engine)

    def make(model: GLM5, tokenizer: Tokenizer, version: int) -> Fleet:
        executor = ProcessExecutor(build, recompute=config.recompute, threads=threads)
        return SupervisedFleet(executor, count, tokenizer=tokenizer, config=limits)

    return make


def engine_actors(
    config: RLRunConfig, count: int, *, threads: int = 1, num_cpus: float = 1.0, num_gpus: float = 0.0,
    limits: FleetConfig | None = None, **engine: Any,
) -> MakeFleet:  # fmt: skip
    """So many Ray actors on the cluster that `ray.init` has connected to, each with a share of a node.

    Every node reads the parent from the same path. Raises `InputError` without the package ray.
    """
    from glm5.rl.fleet.ray import RayExecutor

    build = _build(config, engine)

    def make(model: GLM5, tokenizer: Tokenizer, version: int) -> Fleet:
        executor = RayExecutor(
            build, recompute=config.recompute, threads=threads, num_cpus=num_cpus, num_gpus=num_gpus
        )  # fmt: skip
        return SupervisedFleet(executor, count, tokenizer=tokenizer, config=limits)

    return make


def engine_servers(
    config: RLRunConfig, urls: Sequence[str], weights: Path, run_directory: Path, *,
    api: Literal["glm5", "sglang"] = "glm5", api_key: str | None = None, limits: FleetConfig | None = None,
    transport: AsyncBaseTransport | None = None,
) -> MakeFleet:  # fmt: skip
    """Servers that somebody else has started with the parent's model, one engine each.

    weights: a directory that the servers see too, where they find new versions: those of glm5 were started with
    `--weights-from` it, those of SGLang are told to read a model directory in it. run_directory: of the run, which
    overwrites no versions of another one (`WeightsError`). transport: for tests.
    """
    if config.rollout.temperature != 1.0:
        raise ConfigError("Servers report log-probabilities at temperature 1; leave rollout.temperature at it.")
    if config.rollout.replay_experts or config.recompute is not None:
        raise ConfigError(
            "Servers say nothing of experts and decide about their cache themselves; leave rollout.replay_experts and "
            "recompute out."
        )
    lora = config.learner.lora
    if lora is not None and lora.sync == "adapters":
        raise ConfigError("Servers take whole models; set sync=merged in learner.lora.")
    limits = limits or FleetConfig(outage_seconds=config.rollout.outage_seconds)
    parent = model_of(config.parent)
    spoken = backend_api("generate" if api == "glm5" else "sglang")
    backends = [Backend(url, parent, spoken, api_key=api_key, transport=transport) for url in urls]

    def make(model: GLM5, tokenizer: Tokenizer, version: int) -> Fleet:
        claim(weights, RunDirectory.open(run_directory))
        delivery = (
            Reloaded(weights, model.config, tokenizer) if api == "sglang"
            # Theirs is the version before, whatever a killed run has left: it is written again, and whole.
            else Polled(DirectoryPublisher(weights, after=version - 1))
        )  # fmt: skip
        return SupervisedFleet(ServerExecutor(backends, delivery), len(backends), tokenizer=tokenizer, config=limits)

    return make


def _build(config: RLRunConfig, engine: Mapping[str, Any]) -> Callable[[], Engine]:
    """Makes an engine of the run in a process of its own."""
    return partial(
        parent_engine, model_of(config.parent), config.learner.lora, **{**engine_settings(config), **engine}
    )  # fmt: skip


def engine_settings(config: RLRunConfig) -> dict[str, Any]:
    """Of `Engine`: attention as the learner's, and a place for every rollout that may run at once."""
    most = config.concurrency.most if config.concurrency is not None else 0
    places = max(config.scheduler.max_running, most)
    return {"attention": config.learner.attention, "max_num_seqs": places, "block_size": BLOCK}


def parent_engine(parent: Path, lora: LoRA | None, **settings: Any) -> Engine:
    """An engine with the learner's first policy: the parent, on its rounded base and with its adapters under LoRA."""
    model = load_model(parent, dtype=torch.float32)
    if lora is not None:
        adapt(model, lora)
        model = engine_model(model, lora)
    return Engine(model, Tokenizer.from_pretrained(parent), **settings)
