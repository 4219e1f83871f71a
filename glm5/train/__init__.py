"""Training: one loop, thin stages, run directories, held-out evaluation and the report page."""

from glm5.train.dsa import DSAConfig, warm_up_indexer
from glm5.train.evaluate import Evaluation, evaluate_bits_per_byte, sanity_lines
from glm5.train.loop import LoopConfig, Stage, train
from glm5.train.midtrain import MidtrainConfig, Phase, midtrain
from glm5.train.pretrain import PretrainConfig, pretrain
from glm5.train.progress import RunInterrupted
from glm5.train.report import write_report
from glm5.train.run_directory import RunDirectory
from glm5.train.sample import sample_ids, sample_text
from glm5.train.sft import SFTConfig, sft
from glm5.train.sparse import SparseConfig, train_sparse

__all__ = [
    "DSAConfig", "Evaluation", "LoopConfig", "MidtrainConfig", "Phase", "PretrainConfig", "RunDirectory",
    "RunInterrupted", "SFTConfig", "SparseConfig", "Stage", "evaluate_bits_per_byte", "midtrain", "pretrain",
    "sample_ids", "sample_text", "sanity_lines", "sft", "train", "train_sparse", "warm_up_indexer", "write_report",
]  # fmt: skip
