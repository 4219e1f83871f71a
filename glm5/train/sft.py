"""Supervised fine-tuning: the next-token loss on what the assistant writes, conversations never cut.

GLM-5 report, section 3.1. Data is a chat dataset (`glm5.data.chat_documents`); its mask says which tokens are learned,
so that an erroneous turn can stay in a conversation without being learned. The MTP module is frozen unless `mtp_weight`
is given; the indexers are frozen. With `int4` the forward pass sees quantised weights (`glm5.train.qat`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from glm5.model import GLM5
from glm5.ops.quant import INT4_GROUP
from glm5.optim import OptimizerConfig, Schedule
from glm5.train.checks import check_choice, check_counts
from glm5.train.job import Job, Parent, StageConfig, during, named, perform, sampler
from glm5.train.loop import LoopConfig, Stage
from glm5.train.losses import language_loss
from glm5.train.qat import full_weights, quantize_aware
from glm5.train.run_directory import RunDirectory

NANO_LOOP = LoopConfig(
    steps=150,
    optimizer=OptimizerConfig(lr=5e-3, embedding_lr_scale=4.0),
    schedule=Schedule(shape="cosine", warmup_steps=10, final_fraction=0.1),
    router_bias_rate=0.0,
)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """One supervised run; `train_data` is a chat dataset."""

    attention: Literal["dense", "sparse"] = "dense"
    """Of the model while it learns; sparse after dsa2."""
    mtp_weight: float = 0.0
    """0 leaves the MTP module as it is."""
    int4: Literal["off", "experts", "matrices"] = "off"
    """Which weights the forward pass sees as INT4; the run keeps them in full."""
    int4_group: int = INT4_GROUP
    """Inputs that share a scale."""
    loop: LoopConfig = NANO_LOOP

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "attention", "dense", "sparse")
        check_choice(self, "int4", "off", "experts", "matrices")
        check_counts(self, "int4_group", least=2)


def sft(
    config: SFTConfig, run_directory: Path, *, resume: bool = False, console: Console | None = None
) -> RunDirectory:
    """Trains the parent's model on conversations; gives the finished run. With `resume`, goes on where it stopped."""
    return perform(sft_job(config), run_directory, resume=resume, console=console)


def sft_job(config: SFTConfig) -> Job:
    """The stage with its inputs opened."""
    parent = Parent(config)
    judge = parent.judge(config.attention)
    stage = Stage(
        name="sft",
        loader=parent.loader("keep_whole"),
        loss=functools.partial(
            language_loss, attention=config.attention, mtp_weight=config.mtp_weight,
            balance_weight=config.balance_weight, most=parent.most,
        ),
        learns=lambda name: ".indexer." not in name and (config.mtp_weight > 0 or not name.startswith("mtp.")),
        evaluate=during(judge),
        sample=sampler(parent.tokenizer, config.prompts, config.attention),
    )  # fmt: skip

    def make_model() -> GLM5:
        model = parent.model()
        if config.int4 != "off":
            quantize_aware(model, config.int4, config.int4_group)
        return model

    def after(model: GLM5) -> dict[str, float]:
        if config.int4 == "off":
            return {}
        full_weights(model)
        return named("the same weights, not quantised", judge, model)

    return parent.job(
        stage, make_model, judge=judge, before=lambda model: named("before SFT", judge, model), after=after
    )
