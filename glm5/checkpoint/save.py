"""`save_model` and what it shares with conversion: a model directory that `transformers` and `load_model` read.

Tensors that a bf16 model keeps in fp32 (`glm5.model.keeps_fp32`) stay fp32 on disk. In an FP8 directory the matrices
listed in `names.stored_as_fp8` become e4m3 with one fp32 scale per 128 x 128 block, as in the published FP8 releases.
INT4 directories are our own format, which only this project reads: `X.weight` is uint8 [out, in / 2] as `quantize_int4`
packs it, `X.weight_scale_inv` bf16 [out, in / 32].
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from glm5.checkpoint.names import SCALE_SUFFIX, Layout, build_layout, stored_as_fp8, stored_as_int4
from glm5.checkpoint.shard_writer import Entry, write_shards
from glm5.checkpoint.staging import check_space, staged_directory
from glm5.config import ModelConfig
from glm5.errors import CheckpointError, InputError
from glm5.model import GLM5, keeps_fp32
from glm5.ops.quant import (
    FP8,
    FP8_BLOCK,
    INT4_GROUP,
    fp8_block_scales,
    fp8_scale_shape,
    int4_shapes,
    quantize_fp8,
    quantize_int4,
)

Quantization = Literal["fp8", "int4", "int4-experts"]
INT4 = ("int4", "int4-experts")
MAX_SHARD_BYTES = 5 * 10**9


class SavesItself(Protocol):
    """What `save_model` needs of a tokenizer."""

    def save(self, directory: Path) -> object:
        """Writes the tokenizer's files into `directory`."""


def save_model(
    model: GLM5,
    directory: str | Path,
    tokenizer: SavesItself | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quantization: Quantization | None = None,
    generation_config: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes config.json, generation_config.json, safetensors shards with their index, and the tokenizer's files.

    The directory appears whole or not at all. A model that is already there is replaced at the very end; files beside
    it that are not weights (a model card, a tokenizer when none is given) stay. Values are written as they are, NaN and
    infinity too: `load_model(directory, check_finite=True)` refuses them.

    Args:
        dtype: float32 or bfloat16 on disk; None keeps the model's. With FP8, of the tensors that are not quantised.
        max_shard_bytes: a shard's data is at most this (a larger single tensor stands alone).
        quantization: "fp8" for e4m3 blocks; "int4" for packed matrices, "int4-experts" for those of the experts alone.
        state: the weights, where the model's own are cut over processes.
        generation_config: content of generation_config.json; None writes the config's special tokens.

    Raises `CheckpointError` for unmerged adapters, a destination that is not a model, and a disk that refuses.
    """
    state = model.state_dict() if state is None else state
    adapter = next((name for name in state if "lora_" in name), None)
    if adapter is not None:
        raise CheckpointError(f"{adapter} is an adapter that is not merged; merge the adapters into the weights first.")
    if dtype is None:
        dtype = state["model.embed_tokens.weight"].dtype
    layout = build_layout({name: tensor.shape for name, tensor in state.items()}, model.config.num_hidden_layers)

    entries = plan_entries(ModelWeights(layout, state), dtype, quantization)
    config = config_on_disk(model.config, layout, dtype, quantization)
    check_space(Path(directory), sum(entry.num_bytes for entry in entries))
    with staged_directory(Path(directory)) as stage:
        write_shards(stage, entries, max_shard_bytes)
        (stage / "config.json").write_text(config.to_json())
        generation = dict(generation_config) if generation_config is not None else default_generation_config(config)
        (stage / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(stage)


class WeightSource(ABC):
    """Tensors by their names on disk, made when they are asked for."""

    layout: Layout

    @abstractmethod
    def values(self, name: str) -> Tensor:
        """A tensor of the layout in a float dtype."""

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same in `dtype`."""
        return self.values(name).to(dtype)

    def fp8(self, name: str) -> Tensor:
        """The same as e4m3."""
        return quantize_fp8(self.values(name))[0]

    def fp8_scale(self, name: str) -> Tensor:
        """The scales of `fp8`. They are written before it, and computing them twice is cheaper than keeping it."""
        return fp8_block_scales(self.values(name))

    def int4(self, name: str) -> Tensor:
        """The same as packed INT4."""
        return quantize_int4(self.values(name))[0]

    def int4_scale(self, name: str) -> Tensor:
        """The scales of `int4`."""
        return quantize_int4(self.values(name))[1]


@dataclass(frozen=True)
class ModelWeights(WeightSource):
    """The weights of a model in memory."""

    layout: Layout
    state: Mapping[str, Tensor]

    def values(self, name: str) -> Tensor:
        slot = self.layout.slots[name]
        return slot.of(self.state[slot.tensor])


def plan_entries(source: WeightSource, dtype: torch.dtype, quantization: Quantization | None) -> list[Entry]:
    """What to write for every tensor of the layout; nothing is computed yet."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"dtype is {dtype}; save a model in torch.float32 or torch.bfloat16.")
    entries = []
    for name, slot in source.layout.slots.items():
        if quantization == "fp8" and stored_as_fp8(name):
            scale_shape = fp8_scale_shape(slot.shape)
            entries.append(Entry(name, FP8, slot.shape, partial(source.fp8, name)))
            entries.append(Entry(name + SCALE_SUFFIX, torch.float32, scale_shape, partial(source.fp8_scale, name)))
        elif quantization in INT4 and stored_as_int4(name, experts_only=quantization == "int4-experts"):
            packed, scales = int4_shapes(slot.shape)
            entries.append(Entry(name, torch.uint8, packed, partial(source.int4, name)))
            entries.append(Entry(name + SCALE_SUFFIX, torch.bfloat16, scales, partial(source.int4_scale, name)))
        else:
            target = torch.float32 if keeps_fp32(slot.tensor) else dtype
            entries.append(Entry(name, target, slot.shape, partial(source.cast, name, target)))
    return entries


def config_on_disk(
    config: ModelConfig, layout: Layout, dtype: torch.dtype, quantization: Quantization | None
) -> ModelConfig:
    """`config` with the dtype and quantization of the files beside it."""
    stated: dict[str, Any] | None = None
    if quantization == "fp8":
        # Full module names, which every engine matches alike; patterns are read differently from one to the next.
        matrices = (name for name, slot in layout.slots.items() if len(slot.shape) == 2 and not stored_as_fp8(name))
        stated = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(FP8_BLOCK),
            "modules_to_not_convert": [name.removesuffix(".weight") for name in matrices],
        }
    elif quantization in INT4:
        stated = {"quant_method": "glm5-int4", "group_size": INT4_GROUP}
    return dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."), quantization_config=stated)


def default_generation_config(config: ModelConfig) -> dict[str, Any]:
    """The special tokens that stop and pad generation."""
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {name: list(v) if isinstance(v, tuple) else v for name, v in tokens.items() if v is not None}
