"""Pre-training: dense attention, next-token loss, multi-token prediction, expert balance.

GLM-5 report, section 2.1 and appendix A. The indexer of sparse attention learns nothing here; that is the work of the
DSA stages.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from glm5.config import ModelConfig
from glm5.data import BatchWarmup, open_dataset
from glm5.errors import ConfigError
from glm5.model import GLM5, initialize_, logits_in
from glm5.optim import OptimizerConfig, Schedule
from glm5.text import Tokenizer
from glm5.train.evaluate import evaluate_bits_per_byte, sanity_lines
from glm5.train.job import Data, Job, check_length, check_stage, during, loader_of, open_data, perform, sampler
from glm5.train.loop import LoopConfig, Stage
from glm5.train.losses import language_loss
from glm5.train.run_directory import RunDirectory, directory_sha256

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
    """A preset's name, or a directory with a config.json."""
    tokenizer: Path
    """Its directory."""
    train_data: Data
    """A dataset directory, or the shares of a mixture."""
    heldout_data: Path
    """Text that no stage trains on; bits per byte are measured on it."""
    rows: int = 8
    """Of a batch."""
    length: int = 256
    """Tokens in a row."""
    warmup: BatchWarmup | None = None
    """Fewer rows in the first batches (GLM-5 report: 16M to 64M tokens)."""
    mtp_weight: float = 0.3
    """On the loss of the draft steps."""
    mtp_steps: int = 3
    """Draft steps that share the one MTP module (GLM-5 report, section 2.1)."""
    balance_weight: float = 1e-4
    """On the loss that keeps the experts of a sequence evenly used."""
    heldout_documents: int | None = 12
    """Documents of each evaluation during training; the last one reads all."""
    prompts: tuple[str, ...] = ("And the LORD said unto Moses,", "torch.nn.functional.", "The function returns")
    """Beginnings of the samples."""
    loop: LoopConfig = NANO_LOOP

    def __post_init__(self) -> None:
        check_stage(self)


def pretrain(
    config: PretrainConfig, run_directory: Path, *, resume: bool = False, console: Console | None = None
) -> RunDirectory:
    """Trains a model from random weights; gives the finished run. With `resume`, goes on where the run stopped."""
    return perform(pretrain_job(config), run_directory, resume=resume, console=console)


def pretrain_job(config: PretrainConfig) -> Job:
    """The stage with its inputs opened."""
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {config.model.vocab_size:,}; "
            "train a smaller tokenizer."
        )
    check_length(config.length, config.model)
    data, heldout = open_data(config.train_data, tokenizer), open_dataset(config.heldout_data, tokenizer)
    most = logits_in(config.loop.logits_mib)
    judge = functools.partial(evaluate_bits_per_byte, dataset=heldout, length=config.length, most=most)
    stage = Stage(
        name="pretrain",
        loader=loader_of(config, data),
        loss=functools.partial(
            language_loss, attention="dense", mtp_weight=config.mtp_weight, balance_weight=config.balance_weight,
            most=most,
        ),
        learns=lambda name: ".indexer." not in name,
        evaluate=during(functools.partial(judge, documents=config.heldout_documents)),
        sample=sampler(tokenizer, config.prompts, "dense"),
    )  # fmt: skip
    return Job(
        config=config,
        stage=stage,
        tokenizer=tokenizer,
        inputs={
            "train_data": data.sha256,
            "heldout_data": heldout.sha256,
            "tokenizer": directory_sha256(config.tokenizer),
        },
        make_model=lambda: random_model(config),
        judge=judge,
        row_length=config.length,
        after=lambda model: sanity_lines(data.datasets[0], heldout, tokenizer),
    )


def random_model(config: PretrainConfig) -> GLM5:
    """The model before its first step; the seed alone decides its weights."""
    model = GLM5(config.model)
    initialize_(model, config.model.initializer_range, seed=config.loop.seed)
    model.mtp_steps = config.mtp_steps if len(model.mtp) else 0
    return model
