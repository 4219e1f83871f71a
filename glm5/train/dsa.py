"""The first DSA stage: the lightning indexer learns alone from dense attention (DeepSeek-V3.2 report, section 2.1.1).

Everything but the indexers is frozen, that of the MTP module learns too; attention is dense; the loss is the KL
divergence of the index scores to the head-summed attention, computed in blocks. How much of the attention the selection
keeps is measured before and after: the bits per byte with sparse attention against those with dense attention on the
same text. The second stage is `sparse.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from glm5.data import Batch
from glm5.model import GLM5
from glm5.optim import OptimizerConfig, Schedule
from glm5.train.job import Job, Parent, StageConfig, during, mean_recall, named, perform, recall
from glm5.train.loop import LoopConfig, Stage
from glm5.train.losses import Counts, Loss, count, kl_loss
from glm5.train.run_directory import RunDirectory

NANO_LOOP = LoopConfig(
    steps=60,
    optimizer=OptimizerConfig(name="adamw", lr=5e-3, weight_decay=0.0),
    schedule=Schedule(shape="cosine", warmup_steps=5, final_fraction=0.04),
    router_bias_rate=0.0,
)
"""The report's rates, 5e-3 falling to 2e-4, for as many steps as a laptop has time for."""


@dataclass(frozen=True, kw_only=True)
class DSAConfig(StageConfig):
    """One indexer warm-up. The weights of the language-model losses mean nothing here."""

    mtp_steps: int = 1
    """Draft steps whose attention the MTP module's indexer learns from."""
    loop: LoopConfig = NANO_LOOP


def warm_up_indexer(
    config: DSAConfig, run_directory: Path, *, resume: bool = False, console: Console | None = None
) -> RunDirectory:
    """Trains the indexers of the parent's model; gives the finished run. With `resume`, goes on where it stopped."""
    return perform(dsa_job(config), run_directory, resume=resume, console=console)


def dsa_job(config: DSAConfig) -> Job:
    """The stage with its inputs opened."""
    parent = Parent(config)
    dense, sparse = parent.judge("dense"), parent.judge("sparse")
    measure, watched = recall(parent.heldout, parent.model_config), during(sparse)
    stage = Stage(
        name="dsa1",
        loader=parent.loader(),
        loss=indexer_loss,
        learns=lambda name: ".indexer." in name,
        evaluate=lambda model: watched(model) | mean_recall(measure(model)),
    )
    return parent.job(
        stage, parent.model, judge=sparse, more=measure,
        before=lambda model: {
            **named("the same weights, dense attention", dense, model),
            **named("sparse attention, indexer untrained", sparse, model),
        },
    )  # fmt: skip


def indexer_loss(model: GLM5, batch: Batch, counts: Counts | None = None) -> Loss:
    """Mean KL over the full-indexer layers and the MTP modules, under dense attention."""
    collect = {"indexer_kl", "states"} | ({"mtp"} if len(model.mtp) and model.mtp_steps else set())  # no logits
    output = model(batch.input_ids_BT, None, batch.segment_ids_BT, attention="dense", collect=collect)
    kl = kl_loss(model, output, batch, counts or count(batch, 0), model.mtp_steps)
    return Loss(kl, {"indexer_kl": kl.detach()})
