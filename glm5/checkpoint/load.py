"""`load_model`: a Hugging Face directory -> a model, one tensor at a time.

The model is built without memory, allocated once, and every tensor is copied from its memory-mapped file straight into
its place. Peak memory is the model and at most one shard, whose pages the system can take back at any time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from glm5.checkpoint.checkpoint import Checkpoint
from glm5.errors import CheckpointError, InputError
from glm5.model import GLM5

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    mtp: bool = True,
    check_finite: bool = False,
) -> GLM5:
    """The model in a Hugging Face directory: BF16, FP32 or FP8 blocks, per-expert or stacked names, sharded or not.

    Args:
        dtype: float32 or bfloat16; None takes the dtype of config.json. FP8 weights are dequantised into it.
        mtp: keep the MTP layers if the directory holds them. Directories without them (as `transformers` saves) load
            with `num_nextn_predict_layers=0` and a logged note.
        check_finite: refuse NaN and infinity (reads every loaded weight once more).

    Raises `CheckpointError` naming file and tensor, before anything is allocated where the headers tell already.
    """
    with Checkpoint(directory, mtp=mtp) as checkpoint:
        dtype = dtype or _stated_dtype(checkpoint.config.dtype)
        if dtype not in COMPUTE_DTYPES.values():
            raise InputError(f"dtype is {dtype}; load a model in torch.float32 or torch.bfloat16.")
        config = dataclasses.replace(checkpoint.config, dtype=str(dtype).removeprefix("torch."))
        model = GLM5(config, dtype=dtype, device="meta").to_empty(device=device)
        state = model.state_dict()
        for name in checkpoint.names_by_file():
            slot = checkpoint.layout.slots[name]
            place = slot.of(state[slot.tensor])
            place.copy_(checkpoint.read(name, dtype))
            if check_finite:
                _refuse_non_finite(checkpoint, name, place)
    return model


def _stated_dtype(name: str) -> torch.dtype:
    if name not in COMPUTE_DTYPES:
        raise CheckpointError(f"config.json states dtype {name!r}; pass dtype=torch.bfloat16 or torch.float32 instead.")
    return COMPUTE_DTYPES[name]


def _refuse_non_finite(checkpoint: Checkpoint, name: str, values: Tensor) -> None:
    bad = ~torch.isfinite(values)
    if bad.any():
        first = [int(i) for i in bad.nonzero()[0]]
        raise CheckpointError(
            f"{checkpoint.file_of(name)}: {name} holds {int(bad.sum()):,} NaN or infinite value(s), "
            f"the first at {first}; the checkpoint is damaged: fetch it again, or go back to an earlier one."
        )
