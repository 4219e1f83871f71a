"""What routing replay does where sampler and trainer round differently, and what recording costs.

    python -m benchmarks.rl_routing                        # the bundled nano on its own questions
    python -m benchmarks.rl_routing --model RUN --attention dense

Episodes of `sums` and of a tool task, of up to `--max-tokens` each turn, are sampled by engines of several numerics;
the trainer is the same weights in fp32 or bf16. For each pair: the share of (token, sparse layer) in which the
trainer's router would choose another set of experts, the share of tokens in which some layer would, and the mismatch
|log trainer - log sampler| of the sampled tokens with free and with replayed routing. Where contexts exceed
`index_topk`, positions are selected, and rounding changes that too: `--attention dense` leaves it out.

Cost: processor seconds of the same answers with and without recording, in turns, and bytes of a token in the journal.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.measure import alternate, machine, ratios
from glm5.bundled import bundled_model
from glm5.checkpoint import load_model
from glm5.engine import Engine, SamplingParams
from glm5.engine.pool import Storage
from glm5.envs import Environment, SingleTurn, Sums, calculator_environment
from glm5.model import GLM5
from glm5.rl.codec import turns_to_json
from glm5.rl.forward import fixed_logprobs, run
from glm5.rl.packing import Example, Passes, examples_of, judged, micro_batches
from glm5.rl.records import Batch, Group, Lesson, Rollout, Ticket
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.text import Tokenizer
from glm5.train.run_directory import model_of

NUMERICS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLERS: dict[str, tuple[str, Storage]] = {
    "fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "fp32, cache fp8": ("fp32", "fp8"),
}  # fmt: skip
"""By name: numerics of the weights, storage of the cache."""


@dataclass
class Options:
    """Options of the benchmark."""

    model: Path | None = None
    """A run or model directory; the bundled one when left out."""
    episodes: int = 48
    max_tokens: int = 128
    attention: Literal["sparse", "dense"] = "sparse"
    repeats: int = 5
    threads: int = 1


def sampled(engine: Engine, environments: Sequence[Environment], options: Options) -> list[Rollout]:
    """Episodes of all environments, side by side."""
    config = RolloutConfig(max_tokens=options.max_tokens, thinking=True, replay_experts=True)

    async def everybody() -> list[Rollout]:
        tickets = [(e, Ticket(e.name, i // len(environments))) for i, e in zip(
            range(options.episodes), list(environments) * options.episodes, strict=False)]  # fmt: skip
        return await asyncio.gather(*(play(ticket, e, engine, config) for e, ticket in tickets))

    return [rollout for rollout in asyncio.run(everybody()) if rollout.reward is not None]


def examples(rollouts: Sequence[Rollout]) -> list[Example]:
    """All trajectories, each token with the same weight."""
    batch = Batch(0, 0, (Group(tuple(map(Lesson, rollouts))),))
    return examples_of(judged(batch, "none"), "token-mean", fixed_length=1, version=0)


@torch.no_grad()
def changed(trainer: GLM5, some: Sequence[Example], passes: Passes) -> tuple[float, float]:
    """Shares of (token, layer) and of tokens for which the trainer's own routers choose others than the sampler's."""
    layers, tokens, count = 0, 0, 0
    for rows in micro_batches(some, passes):
        assert rows.experts_BTLK is not None
        out = run(trainer, replace(rows, experts_BTLK=None), passes.attention, {"router"})
        own_BTLK = torch.stack([record.experts_BTK for record in out.router], dim=2)
        other_BTL = (own_BTLK.sort(-1).values != rows.experts_BTLK.sort(-1).values).any(-1)
        other_NL = other_BTL[rows.experts_BTLK[..., 0, 0] >= 0]
        layers, tokens = layers + int(other_NL.sum()), tokens + int(other_NL.any(-1).sum())
        count += len(other_NL)
    return layers / (count * len(trainer.config.sparse_layers)), tokens / count


def mismatch(trainer: GLM5, some: Sequence[Example], passes: Passes, *, replay: bool) -> str:
    """Mean, 99th percentile and maximum of |log trainer - log sampler|."""
    found = fixed_logprobs(trainer, some, passes, replay=replay)
    gaps = [(found[id(e.trajectory)] - torch.tensor([e.trajectory.logprobs[i] for i in e.sampled])).abs() for e in some]
    ordered_N = torch.cat(gaps).double().sort().values
    p99 = ordered_N[math.ceil(0.99 * len(ordered_N)) - 1].item()
    return f"{ordered_N.mean().item():.2g} / {p99:.2g} / {ordered_N[-1].item():.2g}"


def main(options: Options) -> None:
    """Prints a table of mismatches and the costs."""
    torch.set_num_threads(options.threads)
    directory = model_of(options.model) if options.model else bundled_model()
    models = {name: load_model(directory, dtype=dtype).eval() for name, dtype in NUMERICS.items()}
    tokenizer = Tokenizer.from_pretrained(directory)
    environments: list[Environment] = [SingleTurn(Sums()), calculator_environment()]
    passes = Passes(attention=options.attention, rows=8, tokens=8192, row_tokens=None)
    print(machine())
    print("mismatch: mean / 99th percentile / maximum\n")
    print("| sampler | trainer | tokens | other experts: layers, tokens | free | replayed |\n|---|---|---|---|---|---|")
    kept: list[Rollout] = []
    for name, (numerics, storage) in SAMPLERS.items():
        engine = Engine(models[numerics], tokenizer, attention=options.attention, storage=storage, max_num_seqs=16)
        kept = sampled(engine, environments, options)
        engine.close()
        some = examples(kept)
        for trainer, model in models.items():
            layers, tokens = changed(model, some, passes)
            count = sum(len(e.sampled) for e in some)
            free, replayed = (mismatch(model, some, passes, replay=replay) for replay in (False, True))
            print(f"| {name} | {trainer} | {count} | {layers:.2%}, {tokens:.2%} | {free} | {replayed} |", flush=True)

    with_experts = turns_to_json([turn for rollout in kept for turn in rollout.turns])
    inputs = sum(len(turn.experts or ()) for rollout in kept for turn in rollout.turns)
    sizes = [
        len(json.dumps([{k: v for k, v in turn.items() if k != left_out} for turn in with_experts]))
        for left_out in ("", "experts")
    ]
    print(f"\njournal: {sizes[1] / inputs:.1f} bytes a token without experts, {sizes[0] / inputs:.1f} with")

    engine = Engine(models["fp32"], tokenizer, attention=options.attention, enable_prefix_caching=False)
    asked = SamplingParams(max_tokens=options.max_tokens, ignore_eos=True, seed=1)
    prompts = [[7 + i, 9, 11] for i in range(16)]
    found = alternate(
        {
            "recorded": lambda: engine.generate(prompts, replace(asked, experts_from=0)),
            "plain": lambda: engine.generate(prompts, asked),
        },
        options.repeats, clock=time.process_time,
    )  # fmt: skip
    engine.close()
    low, middle, high = ratios(found["plain"], found["recorded"])
    print(f"decoding 16 sequences: {middle:.3f} ({low:.3f} to {high:.3f}) times the processor seconds with recording")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
