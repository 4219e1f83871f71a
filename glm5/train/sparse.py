"""The second DSA stage: the model trains under sparse attention, the indexers beside it (DeepSeek-V3.2, 2.1.1).

The model learns from its own losses alone (next token, MTP, balance), the indexers from the KL to the attention over
the selected keys alone: the model code detaches both ways, gradients are clipped apart, and the indexers have an
optimiser of their own. GLM-5 report, appendix A: constant rate 1e-5.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from glm5.optim import OptimizerConfig, Schedule
from glm5.train.checks import check_numbers
from glm5.train.job import Job, Parent, StageConfig, during, mean_recall, named, perform, recall, sampler
from glm5.train.loop import LoopConfig, Stage
from glm5.train.losses import language_loss
from glm5.train.run_directory import RunDirectory

NANO_LOOP = LoopConfig(
    steps=60,
    optimizer=OptimizerConfig(lr=5e-4, embedding_lr_scale=4.0),
    indexer_optimizer=OptimizerConfig(name="adamw", lr=2e-4, weight_decay=0.0),
    schedule=Schedule(shape="constant", warmup_steps=5),
)


@dataclass(frozen=True, kw_only=True)
class SparseConfig(StageConfig):
    """One run of sparse training."""

    indexer_weight: float = 1.0
    """Of the KL; with AdamW and gradients clipped apart it hardly matters."""
    loop: LoopConfig = NANO_LOOP

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "indexer_weight", above=0)


def train_sparse(
    config: SparseConfig, run_directory: Path, *, resume: bool = False, console: Console | None = None
) -> RunDirectory:
    """Trains the parent's model under sparse attention; gives the finished run."""
    return perform(sparse_job(config), run_directory, resume=resume, console=console)


def sparse_job(config: SparseConfig) -> Job:
    """The stage with its inputs opened."""
    parent = Parent(config)
    dense, sparse = parent.judge("dense"), parent.judge("sparse")
    measure, watched = recall(parent.heldout, parent.model_config), during(sparse)
    stage = Stage(
        name="dsa2",
        loader=parent.loader(),
        loss=functools.partial(
            language_loss, attention="sparse", mtp_weight=config.mtp_weight, balance_weight=config.balance_weight,
            indexer_weight=config.indexer_weight, most=parent.most,
        ),
        evaluate=lambda model: watched(model) | mean_recall(measure(model)),
        sample=sampler(parent.tokenizer, config.prompts, "sparse"),
    )  # fmt: skip
    return parent.job(
        stage, parent.model, judge=sparse, more=measure,
        before=lambda model: {
            **named("before sparse training, dense attention", dense, model),
            **named("before sparse training, sparse attention", sparse, model),
        },
        after=lambda model: named("this model, dense attention", dense, model),
    )  # fmt: skip
