"""From a stage's configuration to its finished run: what all stages have in common around the loop.

A stage's file turns its configuration into a `Job` (inputs opened and hashed, the `Stage` for the loop, how its model
begins and how it is judged); `perform` does the job. The model directory is written last and says that the run is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from glm5.checkpoint import load_model, save_model
from glm5.config import ModelConfig
from glm5.data import BatchWarmup, Loader, Mixture, Share, TokenDataset, open_dataset, open_mixture
from glm5.data.mixture import Packing
from glm5.errors import ConfigError, RunError
from glm5.files import write_json
from glm5.model import GLM5, logits_in
from glm5.parallel.apply import whole_state
from glm5.parallel.context import whole_rows
from glm5.parallel.mesh import on_first, world_rank, world_size
from glm5.parallel.pipeline import PipelinePart
from glm5.text import Tokenizer
from glm5.train.checks import check_counts, check_numbers
from glm5.train.evaluate import Evaluation, evaluate_bits_per_byte
from glm5.train.indexer_recall import measure_indexer_recall
from glm5.train.loop import LoopConfig, Stage, train
from glm5.train.report import write_report
from glm5.train.run_directory import RunDirectory, directory_sha256, exclusive, model_of
from glm5.train.sample import sample_text

Data = Path | tuple[Share, ...]
RECALL_ROWS = 4
Judge = Callable[[GLM5], Evaluation]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage sets that starts from an earlier one."""

    parent: Path
    """The run or model directory to start from; its tokenizer is used."""
    train_data: Data
    """A dataset directory, or the shares of a mixture."""
    heldout_data: Path | None = None
    """Text that no stage trains on; bits per byte are measured before and after. None: not measured."""
    heldout_documents: int | None = 12
    """Documents of each evaluation; None: all."""
    prompts: tuple[str, ...] = ()
    """Beginnings of the samples."""
    rows: int = 8
    """Of a batch."""
    length: int = 256
    """Tokens in a row."""
    warmup: BatchWarmup | None = None
    """Fewer rows in the first batches."""
    mtp_weight: float = 0.3
    """On the loss of the draft steps."""
    mtp_steps: int = 3
    """Draft steps that share the one MTP module (GLM-5 report, section 2.1)."""
    balance_weight: float = 1e-4
    """On the loss that keeps the experts of a sequence evenly used."""
    loop: LoopConfig

    def __post_init__(self) -> None:
        check_stage(self)


def check_stage(config: Any) -> None:
    """Raises ConfigError for shared settings that no stage can use."""
    check_counts(config, "rows", "length")
    check_counts(config, "mtp_steps", least=0)
    check_numbers(config, "mtp_weight", "balance_weight")
    if config.heldout_documents is not None:
        check_counts(config, "heldout_documents")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage with its inputs opened: all that makes the run."""

    config: Any
    """The stage's dataclass; its `loop` drives the loop."""
    stage: Stage
    tokenizer: Tokenizer
    inputs: dict[str, str]
    """name -> SHA-256 of what the run reads."""
    parent: str | None = None
    """SHA-256 of the model that it starts from."""
    make_model: Callable[[], GLM5]
    """The model before the first step."""
    judge: Judge | None = None
    """Bits per byte of the finished model."""
    row_length: int = 0
    """Tokens in a row of that evaluation."""
    before: Callable[[GLM5], dict[str, float]] = lambda model: {}
    """Bits per byte to hold the result against: of the model before the first step, ..."""
    after: Callable[[GLM5], dict[str, float]] = lambda model: {}
    """... and of the finished one under other conditions, or of other models."""
    more: Callable[[GLM5], dict[str, Any]] = lambda model: {}
    """Further measurements of the finished model, for `evaluation.json`."""


def perform(job: Job, run_directory: Path, *, resume: bool = False, console: Console | None = None) -> RunDirectory:
    """Does the job; gives the finished run. With `resume`, goes on where it stopped."""
    job.config.loop.parallel.check_world(world_size())
    with exclusive(run_directory):
        run = RunDirectory.start(
            run_directory, stage=job.stage.name, config=job.config, inputs=job.inputs, parent=job.parent, resume=resume
        )
        if not run.finished:
            _perform(job, run, console)
    return run


def _perform(job: Job, run: RunDirectory, console: Console | None) -> None:
    """All that is left to do."""
    model = job.make_model().eval()
    lines = job.before(model)
    with disk_errors(run):
        train(job.stage, model, run, job.config.loop, console=console)
        weights = whole_state(model)
        evaluation = evaluate(job, model.eval(), weights, lines)

        def finish() -> None:
            if evaluation is not None:
                write_json(run.path / "evaluation.json", evaluation)
            write_report(run.path)
            save_model(model, run.model_directory, job.tokenizer, state=weights)

        on_first(finish)


def evaluate(job: Job, model: GLM5, weights: dict[str, torch.Tensor], lines: dict[str, float]) -> dict[str, Any] | None:
    """What `evaluation.json` says of the finished model; all processes call this, the first one gets it."""

    def judged(model: GLM5) -> dict[str, Any] | None:
        if job.judge is None:
            return None
        heldout = dataclasses.asdict(job.judge(model))
        found = {"heldout": heldout, "row_length": job.row_length, **job.more(model)}
        return found | {"sanity_lines": lines | job.after(model)}

    def put_together() -> dict[str, Any] | None:
        whole = job.make_model().eval()
        whole.load_state_dict(weights)
        return judged(whole)

    if isinstance(model, PipelinePart):  # no process has the whole model
        return on_first(put_together)
    with whole_rows(model):
        return judged(model)


@contextlib.contextmanager
def disk_errors(run: RunDirectory) -> Iterator[None]:
    """Turns a disk that refuses into one sentence; what was whole before stays whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        whole = run.checkpoints()
        raise RunError(
            f"The disk refused to write in {run.path} ({error.strerror}); "
            f"{f'the checkpoint {whole[-1].name} is whole' if whole else 'no checkpoint was written yet'}. "
            "Free some space, then resume."
        ) from error


class Parent:
    """What a stage starts from: the parent's model and tokenizer, the datasets, and their hashes."""

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.most = logits_in(config.loop.logits_mib)
        self.directory = model_of(config.parent)
        self.sha256 = directory_sha256(self.directory)
        self.model_config = ModelConfig.from_pretrained(self.directory)
        check_length(config.length, self.model_config)
        self.tokenizer = Tokenizer.from_pretrained(self.directory)
        self.data = open_data(config.train_data, self.tokenizer)
        self.inputs = {"train_data": self.data.sha256}
        self.heldout: TokenDataset | None = None
        if config.heldout_data is not None:
            self.heldout = open_dataset(config.heldout_data, self.tokenizer)
            self.inputs["heldout_data"] = self.heldout.sha256

    def loader(self, packing: Packing = "cut") -> Loader:
        """Rows of the training data as the configuration says."""
        return loader_of(self.config, self.data, packing)

    def model(self) -> GLM5:
        """The parent's model in fp32, with the draft steps that this stage trains."""
        model = load_model(self.directory, dtype=torch.float32)
        model.mtp_steps = self.config.mtp_steps if len(model.mtp) else 0
        return model

    def judge(self, attention: Literal["dense", "sparse"], length: int | None = None) -> Judge | None:
        """Measures bits per byte of the held-out text; None when there is none."""
        if self.heldout is None:
            return None
        return functools.partial(
            evaluate_bits_per_byte, dataset=self.heldout, length=length or self.config.length,
            documents=self.config.heldout_documents, attention=attention, most=self.most,
        )  # fmt: skip

    def job(self, stage: Stage, make_model: Callable[[], GLM5], **judged: Any) -> Job:
        """The job of a stage that starts here."""
        return Job(
            config=self.config, stage=stage, tokenizer=self.tokenizer, inputs=self.inputs, parent=self.sha256,
            make_model=make_model, **{"row_length": self.config.length, **judged},
        )  # fmt: skip


def open_data(data: Data, tokenizer: Tokenizer) -> Mixture:
    """The training data, checked."""
    return open_mixture((Share(path=data),) if isinstance(data, Path) else data, tokenizer)


def check_length(length: int, model: ModelConfig) -> None:
    """Raises ConfigError for rows that are longer than the model has positions."""
    if length > model.max_position_embeddings:
        raise ConfigError(
            f"rows of {length:,} tokens are longer than the model's {model.max_position_embeddings:,} positions; "
            "choose a shorter length, or a model with a larger max_position_embeddings."
        )


def loader_of(config: Any, data: Mixture, packing: Packing = "cut") -> Loader:
    """The loader of a stage with `rows`, `length`, `warmup` and the seed of its loop."""
    return Loader(
        data, rows=config.rows, length=config.length, seed=config.loop.seed, packing=packing, warmup=config.warmup,
        **part_of(config.loop),
    )  # fmt: skip


def part_of(loop: LoopConfig) -> dict[str, Any]:
    """Which rows of a batch this process reads, for a loader."""
    return {"rank": loop.parallel.data_index(world_rank()), "world": loop.parallel.data}


def sampler(tokenizer: Tokenizer, prompts: tuple[str, ...], attention: str) -> Callable[[GLM5], str] | None:
    """Writes samples after `prompts`; None when there are none."""
    if not prompts:
        return None
    return lambda model: sample_text(model, tokenizer, prompts, attention=attention)


def during(judge: Judge | None) -> Callable[[GLM5], dict[str, float]]:
    """The evaluation that joins the metrics."""
    return lambda model: {} if judge is None else {"heldout_bits_per_byte": judge(model).bits_per_byte}


def recall(heldout: TokenDataset | None, config: ModelConfig) -> Callable[[GLM5], dict[str, Any]]:
    """Measures the recall of the indexers at 8 x index_topk, where there is held-out text of that length."""
    length = min(8 * config.index_topk, config.max_position_embeddings)
    if heldout is None or length <= config.index_topk or int(heldout.lengths.sum()) < RECALL_ROWS * length:
        return lambda model: {}
    return lambda model: {
        "indexer_recall": dataclasses.asdict(
            measure_indexer_recall(model, heldout, length=length, rows=RECALL_ROWS, rows_at_once=1)
        )
    }


def mean_recall(measured: dict[str, Any]) -> dict[str, float]:
    """The attention mass of `recall` as one number for the metrics."""
    layers = measured.get("indexer_recall", {}).get("layers", {})
    return {"indexer_recall": statistics.fmean(layer["mass"] for layer in layers.values())} if layers else {}


def named(name: str, judge: Judge | None, model: GLM5) -> dict[str, float]:
    """One line of an evaluation."""
    return {} if judge is None else {name: judge(model).bits_per_byte}
