"""The first DSA stage: the lightning indexer learns alone from dense attention (DeepSeek-V3.2 report, section 2.1.1).

Everything but the indexers is frozen, that of the MTP module learns too; attention is dense; the loss is the KL
divergence of the index scores to the head-summed attention, computed in blocks. How much of the attention the selection
keeps is measured before and after: the bits per byte with sparse attention against those with dense attention on the
same text.
Left out: the second stage, in which the model trains under sparse attention.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from glm5.checkpoint import load_model, save_model
from glm5.data import Batch, Loader, open_dataset
from glm5.files import write_json
from glm5.model import GLM5
from glm5.optim import OptimizerConfig, Schedule
from glm5.text import Tokenizer
from glm5.train.checks import check_counts
from glm5.train.evaluate import Evaluation, evaluate_bits_per_byte
from glm5.train.loop import LoopConfig, Stage, train
from glm5.train.losses import Loss
from glm5.train.report import write_report
from glm5.train.run_directory import RunDirectory, directory_sha256, model_of

NANO_LOOP = LoopConfig(
    steps=60,
    optimizer=OptimizerConfig(name="adamw", lr=5e-3, weight_decay=0.0),
    schedule=Schedule(shape="cosine", warmup_steps=5, final_fraction=0.04),
    router_bias_rate=0.0,
)
"""The report's rates, 5e-3 falling to 2e-4, for as many steps as a laptop has time for."""


@dataclass(frozen=True, kw_only=True)
class DSAConfig:
    """One indexer warm-up."""

    parent: Path
    """The run or model directory to start from; its tokenizer is used."""
    train_data: Path
    heldout_data: Path
    rows: int = 8
    length: int = 256
    heldout_documents: int | None = 12
    """Documents of the comparison of sparse with dense attention."""
    loop: LoopConfig = NANO_LOOP

    def __post_init__(self) -> None:
        check_counts(self, "rows", "length")
        if self.heldout_documents is not None:
            check_counts(self, "heldout_documents")


def warm_up_indexer(
    config: DSAConfig, run_directory: Path, *, resume: bool = False, console: Console | None = None
) -> RunDirectory:
    """Trains the indexers of the parent's model; gives the finished run. With `resume`, goes on where it stopped."""
    parent = model_of(config.parent)
    tokenizer = Tokenizer.from_pretrained(parent)
    data, heldout = (open_dataset(path, tokenizer) for path in (config.train_data, config.heldout_data))
    run = RunDirectory.start(
        run_directory, stage="dsa", config=config, parent=directory_sha256(parent), resume=resume,
        inputs={"train_data": data.sha256, "heldout_data": heldout.sha256},
    )  # fmt: skip
    if run.finished:
        return run

    def evaluate(model: GLM5, attention: Literal["sparse", "dense"]) -> Evaluation:
        return evaluate_bits_per_byte(
            model.eval(), heldout, length=config.length, documents=config.heldout_documents, attention=attention
        )

    model = load_model(parent, dtype=torch.float32)
    lines = {
        "the same weights, dense attention": evaluate(model, "dense").bits_per_byte,
        "sparse attention, indexer untrained": evaluate(model, "sparse").bits_per_byte,
    }
    stage = Stage(
        name="dsa",
        loader=Loader(data, rows=config.rows, length=config.length, seed=config.loop.seed),
        loss=indexer_loss,
        learns=lambda name: ".indexer." in name,
    )
    train(stage, model, run, config.loop, console=console)
    found = dataclasses.asdict(evaluate(model, "sparse"))
    write_json(run.path / "evaluation.json", {"heldout": found, "row_length": config.length, "sanity_lines": lines})
    write_report(run.path)
    save_model(model.eval(), run.model_directory, tokenizer)
    return run


def indexer_loss(model: GLM5, batch: Batch) -> Loss:
    """Mean KL over the full-indexer layers and the MTP modules, under dense attention."""
    collect = {"indexer_kl"} | ({"mtp"} if len(model.mtp) else set())
    output = model(batch.input_ids_BT, None, batch.segment_ids_BT, attention="dense", collect=collect, logits_to_keep=1)
    kl = torch.stack(list(output.indexer_kl.values())).mean()
    return Loss(kl, {"indexer_kl": kl.detach()}, ())
