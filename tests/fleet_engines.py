"""Engines that a fleet builds in other processes; functions at module level, so that they can be sent there."""

import asyncio
import os
import signal
import time

import torch
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.envs import Reward, Task
from glm5.errors import CheckpointError
from glm5.scoring import Grade


class Letters:
    """Reward for an answer that holds an "e": about half of those of random weights do."""

    name = "letters"

    def task(self, seed, index):
        return Task(f"letters/{seed}/{index}", ({"role": "user", "content": f"{index % 5}"},), "e", "one")

    def score(self, task, response):
        said = "e" in (response["content"] or "")
        return Reward(float(said), Grade("correct" if said else "incorrect", "an e" if said else "no e"))


PROMPTS = [[7, 9, 11 + i, 3] for i in range(6)]


def strict_engine(seed=0):
    """A small engine whose tokens are the same wherever it runs."""
    return Engine(speaker_model(seed), speaker_tokenizer(), strict=True, num_blocks=64)


def slow_engine():
    """The same, at about a hundred steps a second, so that there is time to kill it."""
    engine = strict_engine()
    run = engine._core.runner.run
    engine._core.runner.run = lambda *step: (time.sleep(0.01), run(*step))[1]
    return engine


def held_engine(hold):
    """The same; while the file `hold` is there, it is not ready, and stands still once it has more than 20 tokens."""
    while hold.exists():
        time.sleep(0.02)
    engine = slow_engine()
    run = engine._core.runner.run

    def step(chunks, collect):
        while engine.stats().sampled_tokens > 20 and hold.exists():
            time.sleep(0.02)
        return run(chunks, collect)

    engine._core.runner.run = step
    return engine


def stuck_engine():
    """Never ends its first step when the prompt has token 300 in it."""
    engine = strict_engine()
    run = engine._core.runner.run

    def step(chunks, collect):
        while any(300 in chunk.token_ids for chunk in chunks):
            time.sleep(0.05)
        return run(chunks, collect)

    engine._core.runner.run = step
    return engine


def poisoned_engine(hold):
    """Held, and dies of a prompt that has token 300 in it."""
    engine = held_engine(hold)
    run = engine._core.runner.run

    def step(chunks, collect):
        if any(300 in chunk.token_ids for chunk in chunks):
            os.kill(os.getpid(), signal.SIGKILL)
        return run(chunks, collect)

    engine._core.runner.run = step
    return engine


def taken(flag):
    """Whether the file was there and this process is the one that removed it."""
    try:
        flag.unlink()
    except FileNotFoundError:
        return False
    return True


def mistaken_engine(flag):
    """Makes a mistake between two steps after 50 tokens, where it finds and removes the file `flag`; raises what is no
    `Exception` in every step of the prompt 1, 300; cannot sample for the prompt 1, 301."""
    engine = slow_engine()
    wait, run, take = engine._wait, engine._core.runner.run, engine._core._take

    def waits(busy):
        if engine.stats().sampled_tokens > 50 and taken(flag):
            raise ZeroDivisionError
        return wait(busy)

    def step(chunks, collect):
        if any(chunk.token_ids == [1, 300] for chunk in chunks):
            raise SystemExit("out")
        return run(chunks, collect)

    def takes(work, output):
        if list(work.sequence.prompt_ids) == [1, 301]:
            raise ValueError("its own")
        return take(work, output)

    engine._wait, engine._core.runner.run, engine._core._take = waits, step, takes
    return engine


def short_of_memory_engine(flag):
    """Its step fails once, after 50 tokens, where it finds and removes the file `flag`."""
    engine = slow_engine()
    run = engine._core.runner.run

    def step(chunks, collect):
        if engine.stats().sampled_tokens > 50 and taken(flag):
            raise RuntimeError("out of memory")
        return run(chunks, collect)

    engine._core.runner.run = step
    return engine


def refusing_engine():
    """Cannot be built."""
    raise CheckpointError("There is no model at /nowhere; give a model directory.")


def dying_engine():
    """Dies while it loads."""
    os._exit(3)


def threads_of_engine():
    """Tells its number of threads as its version."""
    return Engine(speaker_model(), speaker_tokenizer(), num_blocks=64, version=torch.get_num_threads())


def params_of(i, **changes):
    """Sampled, logged, with a seed of its own."""
    return SamplingParams(**{"max_tokens": 60, "seed": 100 + i, "ignore_eos": True, **changes})


async def play(source, *, count=len(PROMPTS), **changes):
    """The tokens of some requests at once, each as (id, log-probability, version, text, experts)."""

    async def one(i):
        stream = source.stream(PROMPTS[i], params_of(i, **changes), session_id=f"s{i}", priority=0, deadline=None)
        return [
            (d.token_id, d.logprob, d.version, d.text, d.experts and (d.experts.start, d.experts.data))
            async for d in stream
        ]

    return await asyncio.wait_for(asyncio.gather(*(one(i) for i in range(count))), 120)


def undisturbed(**changes):
    """What an engine alone gives."""
    engine = strict_engine()
    try:
        return asyncio.run(play(engine, **changes))
    finally:
        engine.close()


def endless_engine(started):
    """Loads for ever; writes its process's number to the file `started`."""
    started.write_text(str(os.getpid()))
    time.sleep(3600)
