"""`load_model`, `load_part`: a Hugging Face directory -> a model, or one process's part of it, one tensor at a time.

The model is built without memory, allocated once, and every tensor is copied from its memory-mapped file straight into
its place. Peak memory is the model and at most one shard, whose pages the system can take back at any time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from glm5.checkpoint.checkpoint import Checkpoint
from glm5.checkpoint.names import build_layout
from glm5.errors import CheckpointError, InputError
from glm5.model import GLM5
from glm5.parallel.inference import Groups, cut_model

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
        dtype = _compute_dtype(dtype, checkpoint)
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


def load_part(
    directory: str | Path, groups: Groups, dtype: torch.dtype | None = None, *, check_finite: bool = False
) -> GLM5:
    """The part of a directory's model that this process of an engine holds, on its device; see `load_model`.

    Of every file only that part is read (`Checkpoint.read` says where more is). Raises `InputError` where the plan
    does not fit the model, before anything is read.
    """
    part = groups.part
    with Checkpoint(directory) as checkpoint:
        part.plan.check(checkpoint.config)
        dtype = _compute_dtype(dtype, checkpoint)
        config = dataclasses.replace(checkpoint.config, dtype=str(dtype).removeprefix("torch."))
        model = GLM5(config, dtype=dtype, device="meta")
        cut_model(model, groups)
        model.to_empty(device=groups.device)
        state = model.state_dict()
        slots = build_layout({name: t.shape for name, t in state.items()}, config.num_hidden_layers).slots
        experts = config.n_routed_experts // part.plan.expert
        named = {part.name_on_disk(name, experts): slot for name, slot in slots.items()}
        for name in checkpoint.names_by_file():
            if name not in named:  # another process's expert
                continue
            place = named[name].of(state[named[name].tensor])
            place.copy_(checkpoint.read(name, dtype, part.slices(name, checkpoint.layout.slots[name].shape)))
            if check_finite:
                _refuse_non_finite(checkpoint, name, place)
    return model


def _compute_dtype(asked: torch.dtype | None, checkpoint: Checkpoint) -> torch.dtype:
    dtype = asked or _stated_dtype(checkpoint.config.dtype)
    if dtype not in COMPUTE_DTYPES.values():
        raise InputError(f"dtype is {dtype}; load a model in torch.float32 or torch.bfloat16.")
    return dtype


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
