"""Supervised fine-tuning: the next-token loss on what the assistant writes, conversations never cut.

Data is a chat dataset (`glm5.data.chat_documents`); its mask says which tokens are learned. Left out: INT4
quantisation-aware training, MTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from glm5.checkpoint import load_model, save_model
from glm5.data import Batch, Loader, open_dataset
from glm5.model import GLM5
from glm5.optim import OptimizerConfig, Schedule
from glm5.text import Tokenizer
from glm5.train.checks import check_choice, check_counts, check_numbers
from glm5.train.loop import LoopConfig, Stage, train
from glm5.train.losses import Loss, balance_loss, next_token_loss
from glm5.train.report import write_report
from glm5.train.run_directory import RunDirectory, directory_sha256, model_of

NANO_LOOP = LoopConfig(
    steps=150,
    optimizer=OptimizerConfig(lr=5e-3, embedding_lr_scale=4.0),
    schedule=Schedule(shape="cosine", warmup_steps=10, final_fraction=0.1),
    router_bias_rate=0.0,
)


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """One supervised run."""

    parent: Path
    """The run (or model directory) to start from; its tokenizer is used."""
    train_data: Path
    """A chat dataset."""
    rows: int = 8
    length: int = 256
    attention: Literal["dense", "sparse"] = "dense"
    balance_weight: float = 1e-4
    loop: LoopConfig = NANO_LOOP

    def __post_init__(self) -> None:
        check_counts(self, "rows", "length")
        check_choice(self, "attention", "dense", "sparse")
        check_numbers(self, "balance_weight")


def sft(
    config: SFTConfig, run_directory: Path, *, resume: bool = False, console: Console | None = None
) -> RunDirectory:
    """Trains the parent's model on conversations; gives the finished run. With `resume`, goes on where it stopped."""
    parent = model_of(config.parent)
    tokenizer = Tokenizer.from_pretrained(parent)
    data = open_dataset(config.train_data, tokenizer)
    run = RunDirectory.start(
        run_directory, stage="sft", config=config, inputs={"train_data": data.sha256}, parent=directory_sha256(parent),
        resume=resume,
    )  # fmt: skip
    if run.finished:
        return run

    def loss(model: GLM5, batch: Batch) -> Loss:
        return sft_loss(model, batch, attention=config.attention, balance_weight=config.balance_weight)

    model = load_model(parent, dtype=torch.float32)
    stage = Stage(
        name="sft",
        loader=Loader(data, rows=config.rows, length=config.length, seed=config.loop.seed, packing="keep_whole"),
        loss=loss,
        learns=lambda name: ".indexer." not in name and not name.startswith("mtp."),
    )
    train(stage, model, run, config.loop, console=console)
    write_report(run.path)
    save_model(model.eval(), run.model_directory, tokenizer)
    return run


def sft_loss(model: GLM5, batch: Batch, *, attention: str, balance_weight: float) -> Loss:
    """next token + balance_weight x balance."""
    output = model(batch.input_ids_BT, None, batch.segment_ids_BT, attention=attention, collect={"router"})
    total = next_token_loss(output.logits, batch.targets_BT)
    parts = {"lm": total.detach()}
    if output.router:
        balance = balance_loss(output)
        total = total + balance_weight * balance
        parts["balance"] = balance.detach()
    return Loss(total, parts, output.router)
