"""Training: one loop, thin stages, run directories, held-out evaluation and the report page."""

from glm5.train.evaluate import Evaluation, evaluate_bits_per_byte, sanity_lines
from glm5.train.loop import LoopConfig, RunInterrupted, Stage, train
from glm5.train.pretrain import PretrainConfig, pretrain
from glm5.train.report import write_report
from glm5.train.run_directory import RunDirectory
from glm5.train.sample import sample_ids, sample_text
from glm5.train.sft import SFTConfig, sft

__all__ = [
    "Evaluation", "LoopConfig", "PretrainConfig", "RunDirectory", "RunInterrupted", "SFTConfig", "Stage",
    "evaluate_bits_per_byte", "pretrain", "sample_ids", "sample_text", "sanity_lines", "sft", "train", "write_report",
]  # fmt: skip
