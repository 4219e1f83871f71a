"""Pre-training: dense attention, next-token loss, multi-token prediction, expert balance.

GLM-5 report, section 2.1 and appendix A. The indexer of sparse attention learns nothing here; that is the work of the
DSA stages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from glm5.checkpoint import save_model
from glm5.config import ModelConfig
from glm5.data import Batch, Loader, open_dataset
from glm5.errors import ConfigError
from glm5.files import write_json
from glm5.model import GLM5, initialize_
from glm5.optim import OptimizerConfig, Schedule
from glm5.text import Tokenizer
from glm5.train.checks import check_counts, check_numbers
from glm5.train.evaluate import evaluate_bits_per_byte, sanity_lines
from glm5.train.loop import LoopConfig, Stage, train
from glm5.train.losses import Loss, balance_loss, mtp_loss, next_token_loss
from glm5.train.report import write_report
from glm5.train.run_directory import RunDirectory, directory_sha256
from glm5.train.sample import sample_text

NANO_LOOP = LoopConfig(
    steps=550,
    optimizer=OptimizerConfig(lr=8e-3, embedding_lr_scale=6.0),
    schedule=Schedule(shape="cosine", warmup_steps=20, final_fraction=0.1),
    evaluate_every=100,
)
"""`nano` in about four minutes on two idle cores. Embeddings learn from few tokens here, hence their larger rate."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pre-training run. Directories are datasets made by `tokenize_corpus`, and a tokenizer saved beside them."""

    model: ModelConfig
    tokenizer: Path
    train_data: Path
    heldout_data: Path
    rows: int = 8
    length: int = 256
    """Tokens in a row."""
    mtp_weight: float = 0.3
    mtp_steps: int = 1
    """Draft steps that share the one MTP module (the report trains 3)."""
    balance_weight: float = 1e-4
    heldout_documents: int | None = 12
    """Documents of each evaluation during training; the last one reads all."""
    prompts: tuple[str, ...] = ("And the LORD said unto Moses,", "torch.nn.functional.", "The function returns")
    """Beginnings of the samples."""
    loop: LoopConfig = NANO_LOOP

    def __post_init__(self) -> None:
        check_counts(self, "rows", "length")
        check_counts(self, "mtp_steps", least=0)
        check_numbers(self, "mtp_weight", "balance_weight")
        if self.heldout_documents is not None:
            check_counts(self, "heldout_documents")


def pretrain(
    config: PretrainConfig, run_directory: Path, *, resume: bool = False, console: Console | None = None
) -> RunDirectory:
    """Trains a model from random weights; gives the finished run. With `resume`, goes on where the run stopped."""
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {config.model.vocab_size:,}; "
            "train a smaller tokenizer."
        )
    data, heldout = (open_dataset(path, tokenizer) for path in (config.train_data, config.heldout_data))
    inputs = {
        "train_data": data.sha256,
        "heldout_data": heldout.sha256,
        "tokenizer": directory_sha256(config.tokenizer),
    }
    run = RunDirectory.start(run_directory, stage="pretrain", config=config, inputs=inputs, resume=resume)
    if run.finished:
        return run

    def loss(model: GLM5, batch: Batch) -> Loss:
        return pretrain_loss(model, batch, mtp_weight=config.mtp_weight, balance_weight=config.balance_weight)

    def evaluate(model: GLM5) -> dict[str, float]:
        found = evaluate_bits_per_byte(model, heldout, length=config.length, documents=config.heldout_documents)
        return {"heldout_bits_per_byte": found.bits_per_byte}

    model = GLM5(config.model)
    initialize_(model, config.model.initializer_range, seed=config.loop.seed)
    model.mtp_steps = config.mtp_steps if len(model.mtp) else 0
    stage = Stage(
        name="pretrain",
        loader=Loader(data, rows=config.rows, length=config.length, seed=config.loop.seed),
        loss=loss,
        learns=lambda name: ".indexer." not in name,
        evaluate=evaluate,
        sample=lambda model: sample_text(model, tokenizer, config.prompts),
    )
    train(stage, model, run, config.loop, console=console)
    found = dataclasses.asdict(evaluate_bits_per_byte(model.eval(), heldout, length=config.length))
    lines = sanity_lines(data, heldout, tokenizer)
    write_json(run.path / "evaluation.json", {"heldout": found, "row_length": config.length, "sanity_lines": lines})
    write_report(run.path)
    save_model(model, run.model_directory, tokenizer)
    return run


def pretrain_loss(model: GLM5, batch: Batch, *, mtp_weight: float, balance_weight: float) -> Loss:
    """next token + mtp_weight x MTP + balance_weight x balance, with dense attention."""
    collect = {"router"} | ({"mtp"} if mtp_weight and len(model.mtp) else set())
    output = model(batch.input_ids_BT, None, batch.segment_ids_BT, attention="dense", collect=collect)
    total = next_token_loss(output.logits, batch.targets_BT)
    parts = {"lm": total.detach()}
    if output.mtp_logits:
        drafts = mtp_loss(output, batch)
        total = total + mtp_weight * drafts
        parts["mtp"] = drafts.detach()
    if output.router:
        balance = balance_loss(output)
        total = total + balance_weight * balance
        parts["balance"] = balance.detach()
    return Loss(total, parts, output.router)
