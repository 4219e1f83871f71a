"""GLM-5's recipe at laptop size, long enough to be judged: `python -m recipes.nano --out runs/nano`.

Read it top to bottom: it is the whole training of a model, from text to instructions, in numbers. What happens with
them is in `glm5/cli/recipe.py`: a stage that is whole is not done again, Ctrl-C saves, --resume goes on. At most two
hours on two cores. Results and their bars: `docs/results/nano.md`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from glm5.cli.recipe import Recipe, run_recipe
from glm5.cli.recipe_data import DataPlan, Layout, LongPhase
from glm5.cli.threads import use_threads
from glm5.config import ModelConfig
from glm5.data import Share
from glm5.data.long_context import Kind
from glm5.data.recipe_sets import (
    NANO_INSTRUCT,
    NANO_SFT_LENGTH,
    NANO_SFT_ROWS,
    NANO_WORLD,
    NANO_WORLD_SHARE,
)
from glm5.evals.needles import NeedleConfig
from glm5.evals.skills import SkillsConfig
from glm5.optim import OptimizerConfig, Schedule
from glm5.train import DSAConfig, LoopConfig, MidtrainConfig, PretrainConfig, SFTConfig, SparseConfig

PROMPTS = ("And the LORD said unto Moses,", "torch.nn.functional.", "The function returns")
LISTS: dict[Kind, float] = {"repeat": 1.0, "key_value": 1.0}
NEEDLES: dict[Kind, float] = {"repeat": 0.5, "key_value": 1.0, "multi_needle": 2.0, "needle": 1.0}
CURRICULUM = (
    LongPhase(length=64, rows=16, steps=300, kinds=LISTS, words=32, text=0.125),
    LongPhase(length=64, rows=16, steps=300, kinds=LISTS, words=128, zipf=8.0, text=0.125),
    LongPhase(length=64, rows=16, steps=60, kinds=NEEDLES, words=128, text=0.125),
    LongPhase(length=128, rows=9, steps=100, kinds=NEEDLES, words=128, text=0.125),
    LongPhase(length=256, rows=5, steps=80, kinds=NEEDLES, words=128, text=0.25),
    LongPhase(length=512, rows=4, steps=60, kinds=NEEDLES, words=128, text=0.5),
    LongPhase(length=1024, rows=2, steps=80, kinds=NEEDLES, words=128, text=0.5),
    LongPhase(length=2048, rows=2, steps=100, kinds=NEEDLES, words=128, text=0.5),
)
"""Short rows over few words until the circuit that looks up has formed, then more words, then longer rows (LOG.md)."""


def nano_recipe(out: Path, seed: int = 0) -> Recipe:
    """The numbers. Text and the closed world of facts first; then longer and longer rows; then sparse; then chats."""
    at = Layout(out)
    text, facts = Share(path=at.train, weight=1 - NANO_WORLD_SHARE), Share(path=at.facts, weight=NANO_WORLD_SHARE)
    longest = CURRICULUM[-1].mixture(at)
    lookups = next(phase for phase in CURRICULUM if phase.length == 512).mixture(at)
    held: dict[str, Any] = {"heldout_data": at.heldout, "heldout_documents": 12}
    return Recipe(
        preset="nano",
        data=DataPlan(world=NANO_WORLD, curriculum=CURRICULUM, chats=NANO_INSTRUCT),
        stages={
            "pretrain": PretrainConfig(
                model=ModelConfig.from_preset("nano"), tokenizer=at.tokenizer, train_data=(text, facts),
                prompts=PROMPTS, mtp_steps=1, **held,  # 3, as published, cost 1.7 times the time here
                loop=LoopConfig(
                    steps=600, seed=seed, evaluate_every=100,
                    optimizer=OptimizerConfig(lr=8e-3, embedding_lr_scale=6.0),
                    schedule=Schedule(shape="cosine", warmup_steps=20, final_fraction=0.1),
                ),
            ),
            "midtrain": MidtrainConfig(
                parent=at.stage("pretrain"), train_data=(text, facts), rope_theta=None, mtp_weight=0.0, **held,
                phases=tuple(phase.phase(at) for phase in CURRICULUM),
                loop=LoopConfig(
                    steps=sum(phase.steps for phase in CURRICULUM), seed=seed, spike_factor=None,
                    optimizer=OptimizerConfig(lr=8e-3, embedding_lr_scale=3.0),
                    schedule=Schedule(shape="linear", warmup_steps=10, final_fraction=0.1),
                ),
            ),
            "dsa1": DSAConfig(
                # Half lookups: taught on plain text alone, the indexer may not choose needles (LOG.md).
                parent=at.stage("midtrain"), train_data=lookups, rows=4, length=512, **held,
                loop=LoopConfig(
                    steps=80, seed=seed, router_bias_rate=0.0,
                    optimizer=OptimizerConfig(name="adamw", lr=5e-3, weight_decay=0.0),
                    schedule=Schedule(shape="cosine", warmup_steps=5, final_fraction=0.04),
                ),
            ),
            "dsa2": SparseConfig(
                parent=at.stage("dsa1"), train_data=longest, rows=1, length=2048, **held,
                loop=LoopConfig(
                    steps=40, seed=seed, spike_factor=None,
                    optimizer=OptimizerConfig(lr=5e-4, embedding_lr_scale=3.0),
                    indexer_optimizer=OptimizerConfig(name="adamw", lr=2e-4, weight_decay=0.0),
                    schedule=Schedule(shape="constant", warmup_steps=5),
                ),
            ),
            "sft": SFTConfig(
                parent=at.stage("dsa2"), train_data=at.chats, attention="sparse",
                rows=NANO_SFT_ROWS, length=NANO_SFT_LENGTH,
                loop=LoopConfig(
                    steps=300, seed=seed, router_bias_rate=0.0, spike_factor=None,
                    optimizer=OptimizerConfig(lr=5e-3, embedding_lr_scale=4.0),
                    schedule=Schedule(shape="cosine", warmup_steps=10, final_fraction=0.1),
                ),
            ),
            "sft2": SFTConfig(
                parent=at.stage("sft"), train_data=at.chats, attention="sparse",
                rows=NANO_SFT_ROWS, length=NANO_SFT_LENGTH,
                loop=LoopConfig(
                    steps=220, seed=seed + 1, router_bias_rate=0.0, spike_factor=None,
                    optimizer=OptimizerConfig(lr=3e-3, embedding_lr_scale=4.0),
                    schedule=Schedule(shape="cosine", warmup_steps=10, final_fraction=0.1),
                ),
            ),
        },
        needles=NeedleConfig(lengths=(512, 2048), per_cell=20),
        recall_rows=8,
        skills=SkillsConfig(),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train nano, from text to instructions."""

    out: Path = Path("runs/nano")
    """Directory of the whole run."""
    seed: int = 0
    resume: bool = False
    """Go on where it stopped."""
    threads: int | None = None
    """Processor threads; all cores when left out."""
    json: bool = False
    """Print the summary as one JSON object."""


def main(options: Options) -> None:
    """Runs what is missing."""
    use_threads(options.threads)
    console = Console(stderr=options.json)
    summary = run_recipe(nano_recipe(options.out, options.seed), options.out, resume=options.resume, console=console)
    if options.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main(tyro.cli(Options))
