"""Short pre-training runs, their states and their ends, for the tests of this room."""

import os
import signal

import torch

from glm5.checkpoint.training_state import read_training_state
from glm5.data import Loader
from glm5.optim import OptimizerConfig, Schedule
from glm5.train import LoopConfig, PretrainConfig


def pretrain_config(tiny, **loop) -> PretrainConfig:
    root, model = tiny
    settings = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 3, "seed": 5, **loop}
    settings.setdefault("optimizer", OptimizerConfig(lr=5e-3))
    return PretrainConfig(
        model=model, tokenizer=root / "tokenizer", train_data=root / "train", heldout_data=root / "heldout",
        rows=2, length=32, mtp_steps=2, heldout_documents=2, prompts=("lamp",),
        loop=LoopConfig(schedule=Schedule(warmup_steps=2), **settings),
    )  # fmt: skip


def state_of(run) -> dict:
    return read_training_state(run.checkpoints()[-1])


def weights_of(run) -> dict:
    return {name.removeprefix("model."): x for name, x in state_of(run).items() if name.startswith("model.")}


def same(a, b) -> bool:
    """Equality to the bit of nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class StopAt:
    """Sends this process the signal of Ctrl-C when the progress of a run reaches a step."""

    def __init__(self, monkeypatch, step: int, loader: type = Loader) -> None:
        original = loader.batch

        def batch(self, number):
            if number == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, number)

        monkeypatch.setattr(loader, "batch", batch)
