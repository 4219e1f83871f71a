"""`glm5 quickstart`: the whole recipe at small size, from real public text to a model that answers.

It shows the direction of every stage within a quarter of an hour; `recipes/nano.py` is the run that is long enough to
be judged. What happens is in `glm5/cli/recipe.py`; here are the numbers.
"""

from __future__ import annotations

import dataclasses
import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from glm5.cli.recipe import Policy, Recipe, run_recipe
from glm5.cli.recipe_data import DataPlan, Layout, LongPhase
from glm5.cli.threads import use_threads
from glm5.config import ModelConfig
from glm5.data import Share
from glm5.data.instruct import InstructConfig
from glm5.data.recipe_sets import NANO_SFT_LENGTH, NANO_SFT_ROWS
from glm5.data.world import WorldConfig
from glm5.data.world_text import open_world
from glm5.envs import Environment, Facts, SingleTurn, Sums, facts_environment
from glm5.evals.needles import NeedleConfig
from glm5.evals.skills import SkillsConfig
from glm5.optim import OptimizerConfig, Schedule
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.rollout_config import RolloutConfig
from glm5.train import PretrainConfig, SFTConfig
from glm5.train.dsa import NANO_LOOP as INDEXER_LOOP
from glm5.train.dsa import DSAConfig
from glm5.train.loop import LoopConfig
from glm5.train.midtrain import MidtrainConfig
from glm5.train.sparse import NANO_LOOP as SPARSE_LOOP
from glm5.train.sparse import SparseConfig

CURRICULUM = (
    LongPhase(length=64, rows=16, steps=300, kinds={"repeat": 1, "key_value": 1}, words=32, text=0.125),
    LongPhase(
        length=256, rows=5, steps=40, kinds={"key_value": 1, "multi_needle": 2, "needle": 1}, words=32, text=0.25
    ),
    LongPhase(length=512, rows=4, steps=30, kinds={"key_value": 1, "multi_needle": 2, "needle": 1}, words=32, text=0.5),
)
"""Lookups over few words: short rows until the circuit forms, then longer ones."""
CONVERSATIONS = 6000
PROMPTS = ("And the LORD said unto Moses,", "torch.nn.functional.", "The function returns")


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """From text to a model that answers, in minutes on a laptop."""

    out: Path = Path("runs/quickstart")
    """Directory of the whole run."""
    preset: str = "nano"
    """The model's shape."""
    resume: bool = False
    """Go on where an interrupted quickstart stopped."""
    threads: int | None = None
    """Processor threads; all cores when left out."""
    pretrain_steps: int | None = None
    """Instead of the tuned number; fewer for a quick look. So for the other stages."""
    midtrain_steps: int | None = None
    """Of the longer contexts."""
    dsa1_steps: int | None = None
    """Of the indexer alone."""
    dsa2_steps: int | None = None
    """Of sparse attention."""
    sft_steps: int | None = None
    """Of the conversations."""
    rl_steps: int | None = None
    """Of reinforcement learning."""
    questions: int | None = None
    """Questions of each kind in the evaluations."""
    json: bool = False
    """Print the result as one JSON object."""


def run(options: QuickstartOptions) -> int:
    """Runs the whole chain; prints where everything is and what to try next."""
    use_threads(options.threads)
    console = Console(stderr=options.json)
    recipe = quick_recipe(options.out, options.preset)
    given = {name: getattr(options, f"{name}_steps") for name in (*recipe.stages, "rl")}
    recipe = recipe.with_steps({name: steps for name, steps in given.items() if steps is not None})
    if options.questions is not None:
        recipe = with_questions(recipe, options.questions)
    summary = run_recipe(recipe, options.out, resume=options.resume, console=console)
    if options.json:
        print(json_text.dumps(summary))
        return 0
    last = options.out / ("rl" if recipe.policy is not None else list(recipe.stages)[-1])
    console.print(f"\nReport:       {options.out / 'report.html'}", soft_wrap=True)
    console.print(f"Talk to it:   glm5 chat {last}", soft_wrap=True)
    console.print(f"Serve it:     glm5 serve {last}", soft_wrap=True)
    return 0


def quick_recipe(out: Path, preset: str = "nano") -> Recipe:
    """The numbers of the quickstart: some 1.8M tokens, estimated at ten minutes of training on two cores."""
    at = Layout(out)
    model = ModelConfig.from_preset(preset)
    text, facts = Share(path=at.train, weight=8), Share(path=at.facts, weight=2)
    held: dict[str, Any] = {"heldout_data": at.heldout, "heldout_documents": 12}
    return Recipe(
        preset=preset,
        data=DataPlan(
            vocab_size=model.vocab_size,
            world=WorldConfig(entities=100),
            curriculum=CURRICULUM,
            chats=InstructConfig(conversations=CONVERSATIONS),
        ),
        stages={
            "pretrain": PretrainConfig(
                model=model, tokenizer=at.tokenizer, train_data=(text, facts), prompts=PROMPTS, mtp_steps=1,
                **held,
                loop=LoopConfig(
                    steps=260,
                    optimizer=OptimizerConfig(lr=8e-3, embedding_lr_scale=6.0),
                    schedule=Schedule(shape="cosine", warmup_steps=20, final_fraction=0.1),
                    evaluate_every=100,
                ),
            ),
            "midtrain": MidtrainConfig(
                parent=at.stage("pretrain"), train_data=(text, facts), rope_theta=None, mtp_weight=0.0, **held,
                phases=tuple(phase.phase(at) for phase in CURRICULUM),
                loop=LoopConfig(
                    steps=sum(phase.steps for phase in CURRICULUM), spike_factor=None,
                    optimizer=OptimizerConfig(lr=8e-3, embedding_lr_scale=3.0),
                    schedule=Schedule(shape="linear", warmup_steps=5, final_fraction=0.25),
                ),
            ),
            "dsa1": DSAConfig(
                parent=at.stage("midtrain"), train_data=CURRICULUM[-1].mixture(at), length=512, rows=2, **held,
                loop=dataclasses.replace(INDEXER_LOOP, steps=50),
            ),
            "dsa2": SparseConfig(
                parent=at.stage("dsa1"), train_data=(text, facts), length=512, rows=2, **held,
                loop=dataclasses.replace(SPARSE_LOOP, steps=40),
            ),
            "sft": SFTConfig(
                parent=at.stage("dsa2"), train_data=at.chats, attention="sparse",
                rows=NANO_SFT_ROWS, length=NANO_SFT_LENGTH,
                loop=LoopConfig(
                    steps=200, router_bias_rate=0.0, spike_factor=None,
                    optimizer=OptimizerConfig(lr=5e-3, embedding_lr_scale=4.0),
                    schedule=Schedule(shape="cosine", warmup_steps=10, final_fraction=0.1),
                ),
            ),
        },
        needles=NeedleConfig(lengths=(256, 512), per_cell=10, words=CURRICULUM[-1].words),
        skills=SkillsConfig(facts=120, sums=40, tools=20, unknown=20),
        policy=Policy(
            config=RLRunConfig(
                parent=at.stage("sft"), steps=120,
                rollout=RolloutConfig(max_tokens=48, thinking=True),
                scheduler=SchedulerConfig(groups_per_batch=8, group_size=8, max_staleness=2),
                learner=LearnerConfig(
                    optimizer=OptimizerConfig(name="adamw", lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0),
                    schedule=Schedule(shape="linear", warmup_steps=4, final_fraction=0.1),
                ),
            ),
            environments=environments,
        ),
    )  # fmt: skip


def environments(at: Layout) -> list[Environment]:
    """Sums, and the facts that were taught, with a reward for saying "I don't know" where nothing can be known."""
    return [SingleTurn(Sums(split="train")), facts_environment(Facts(open_world(at.world)))]


def with_questions(recipe: Recipe, count: int) -> Recipe:
    """The same recipe with another number of questions."""
    return dataclasses.replace(
        recipe,
        needles=dataclasses.replace(recipe.needles, per_cell=count),
        skills=dataclasses.replace(recipe.skills, facts=count, sums=count, tools=count, unknown=count),
    )
