"""What the tests of an engine over several processes run in each of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from tiny import tiny_model

from glm5.engine import Engine, SamplingParams, follow
from glm5.errors import ParallelError
from glm5.parallel import InferencePlan

SMALL = {"block_size": 4, "num_blocks": 40, "max_num_batched_tokens": 24, "max_num_seqs": 6}
"""Prompts are computed in chunks, and sequences have to give way to each other."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(
    temperature=0.7, seed=3, max_tokens=12, ignore_eos=True, n=3, prompt_logprobs=1, experts_from=0
)
PROMPTS = [list(range(5, 60)), [7, 8, 9], list(range(30, 45)), [90], list(range(11, 52))]
SHAPE = {
    "vocab_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "indexer_types": ("full", "shared", "full"),
}  # fmt: skip


def small_model(seed: int = 0, **changes: object) -> torch.nn.Module:
    return tiny_model(seed, **{**SHAPE, **changes})


def played(engine: Engine) -> dict[str, object]:
    """Everything that an engine does once: chunks, batches, forks, preemption, found prefixes, new weights."""
    heard = {"first": engine.generate(PROMPTS, GREEDY), "sampled": engine.generate([PROMPTS[2]], SAMPLED)}
    heard["alone"] = engine.generate([PROMPTS[0]], GREEDY)
    heard["again"] = engine.generate([[*PROMPTS[0], 3, 4]], GREEDY)
    found = heard["again"][0].cached_tokens
    engine.update_weights(1, small_model(1).state_dict())
    heard["new weights"] = engine.generate(PROMPTS[:2], GREEDY)
    stats = asdict(engine.stats())
    return {"heard": heard, "found": found, "stats": stats, "bytes": held(engine.model)}


def briefly_played(engine: Engine) -> dict[str, object]:
    """One batch of prompts."""
    heard = {"first": engine.generate(PROMPTS, GREEDY)}
    return {"heard": heard, "stats": asdict(engine.stats())}


def held(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def play(
    directory: str, plan: InferencePlan, settings: dict[str, object], what: Callable[[Engine], Any] = played
) -> Any:
    """The first process plays, the others follow."""
    if dist.get_rank() > 0:
        follow(directory, plan)
        return None
    engine = Engine(directory, parallel=plan, **settings)
    result = what(engine)
    engine.close()
    return result


def lose(directory: str, plan: InferencePlan, how: str) -> tuple[list[str], float] | str | None:
    """The second process is killed, stopped, or fails in a step; what the first one's readers are told, and when."""
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == 1:
        if how == "fails":
            torch.nn.functional.silu = _fails
        try:
            follow(directory, plan)
        except ParallelError as error:
            return str(error)
        return None
    engine, noticed = Engine(directory, parallel=plan), []
    engine.leader.on_lost = noticed.append
    if how == "killed":
        stream = engine.stream([5, 6, 7], SamplingParams(max_tokens=400, ignore_eos=True))
        next(iter(stream))
        os.kill(pids[1], signal.SIGKILL)
    elif how == "stopped":
        os.kill(pids[1], signal.SIGSTOP)
    start, told = time.monotonic(), []
    for _ in range(2):
        try:
            engine.generate([[5, 6, 7]], GREEDY)
        except ParallelError as error:
            told.append(str(error))
    try:
        engine.update_weights(1, small_model(1).state_dict())
    except ParallelError as error:
        told.append(str(error))
    seconds = time.monotonic() - start
    engine.close()
    if how == "stopped":
        os.kill(pids[1], signal.SIGKILL)
    assert noticed == told[:1]
    return told, seconds


def _fails(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no memory left")
