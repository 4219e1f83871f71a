"""Held-out reward during a run: tasks that are never learnt from, played every so many versions under the new weights.

The tasks are the same each time, and so are the random numbers of their samples, so two values differ by the weights
alone. A strict engine plays them: what is measured does not depend on what is played beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, TypeVar

from glm5.engine import Engine
from glm5.envs import Environment
from glm5.model import GLM5
from glm5.rl.records import Rollout, Ticket
from glm5.rl.retention import Measure, Retention
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.text import Tokenizer
from glm5.train.checks import check_counts

T = TypeVar("T")
OTHER_SEED = 1_000_003
"""Added to the run's: where an environment has no split of its own, held-out tasks are at least other ones."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What is asked of held-out environments: at version 0, `every`, 2 `every`, ... and of the finished model."""

    tasks: int = 64
    """Of each environment, each played once."""
    every: int = 10
    """Versions between two measurements."""
    at_once: int = 32
    """Episodes."""

    def __post_init__(self) -> None:
        check_counts(self, "tasks", "every", "at_once")


def held_out_rewards(
    environments: Sequence[Environment], tokenizer: Tokenizer, config: HeldOut, rollout: RolloutConfig,
    attention: Literal["sparse", "dense"], *, timed: bool = True,
) -> Retention | None:  # fmt: skip
    """Mean rewards as `NAME/reward`; episodes without a reward are left out and counted in `NAME/unscored`.

    timed: whether time limits count; without, what is measured depends on no clock.
    """
    if not environments:
        return None
    # The learner waits for what is measured: an environment's server that is away is not waited for.
    sampling = replace(rollout, seed=rollout.seed + OTHER_SEED, replay_experts=False, outage_seconds=0.0)
    measures = [_reward(one, tokenizer, config, sampling, attention, timed) for one in environments]
    return Retention(tuple(measures), config.every)


def _reward(
    environment: Environment, tokenizer: Tokenizer, config: HeldOut, rollout: RolloutConfig,
    attention: Literal["sparse", "dense"], timed: bool,
) -> Measure:  # fmt: skip
    async def played(engine: Engine) -> list[Rollout]:
        places = asyncio.Semaphore(config.at_once)

        async def one(index: int) -> Rollout:
            async with places:
                return await play(Ticket(environment.name, index), environment, engine, rollout, timed=timed)

        return list(await asyncio.gather(*map(one, range(config.tasks))))

    def measure(model: GLM5) -> dict[str, float]:
        engine = Engine(model, tokenizer, attention=attention, strict=True, max_num_seqs=config.at_once)
        try:
            rollouts = _apart(played(engine))
        finally:
            engine.close()
        rewards = [rollout.reward.value for rollout in rollouts if rollout.reward is not None]
        found = {f"{environment.name}/reward": fmean(rewards)} if rewards else {}
        failed = len(rollouts) - len(rewards)
        return found | ({f"{environment.name}/unscored": failed / len(rollouts)} if failed else {})

    return measure


def _apart(work: Coroutine[Any, Any, T]) -> T:
    """The result, from an event loop in a thread of its own: the caller may have one that runs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
