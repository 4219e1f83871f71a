"""A model directory, checked against the model it claims to hold before a single weight is read.

`Checkpoint` pairs every tensor on disk with its slot in the model and refuses, naming file and tensor: a tensor that is
missing, unexpected, of another shape or of a kind that is not a weight, and FP8 tensors without fitting scales.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from torch import Tensor

from glm5.checkpoint.names import (
    SCALE_SUFFIX,
    Layout,
    build_layout,
    is_shared_copy,
    layer_number,
)
from glm5.checkpoint.tensor_files import FLOAT_DTYPES, TensorFiles
from glm5.config import ModelConfig
from glm5.errors import CheckpointError, did_you_mean
from glm5.files import restore_directory
from glm5.model import GLM5
from glm5.ops.quant import FP8_BLOCK, INT4_GROUP, dequantize_fp8, dequantize_int4, fp8_scale_shape, int4_shapes

logger = logging.getLogger(__name__)


class Checkpoint:
    """The tensors of a model directory, dequantised as they are read; a context manager that closes the open shard.

    Attributes:
        config: of the model as the directory can fill it: without MTP layers when it holds none (as directories saved
            by `transformers` do) or when `mtp` is False.
        layout: every tensor of that model under its name on disk, per expert.
        holders: the tensor in the files that holds each of them: itself, or the stacked tensor of all experts.
        block, group: FP8 block size, INT4 group size.
    """

    def __init__(self, directory: str | Path, *, mtp: bool = True) -> None:
        self.directory = Path(directory)
        restore_directory(self.directory)
        self.files = TensorFiles(self.directory)
        config = ModelConfig.from_pretrained(self.directory)
        stated = config.quantization_config or {}
        self.block: tuple[int, int] = tuple(stated.get("weight_block_size", FP8_BLOCK))
        self.group: int = stated.get("group_size", INT4_GROUP)
        self._trunk_only = not mtp
        if not mtp or not self._holds_mtp(config):
            config = dataclasses.replace(config, num_nextn_predict_layers=0)
        self.config = dataclasses.replace(config, quantization_config=None)
        self.layout = model_layout(self.config)
        self.holders = self._match()
        self._scales: dict[str, Tensor] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    def names_by_file(self) -> list[str]:
        """Names of `layout` in the order in which reading opens every file once."""
        return sorted(self.holders, key=lambda name: self.files.info[self.holders[name]].file)

    def file_of(self, name: str) -> Path:
        """The file that holds this tensor of `layout`."""
        return self.directory / self.files.info[self.holders[name]].file

    def read(self, name: str, dtype: torch.dtype, piece: tuple[slice, ...] = ()) -> Tensor:
        """A tensor of `layout`: memory-mapped in its own dtype, or dequantised to `dtype` if it is FP8 or INT4.

        piece: of a matrix only these rows and columns. Whatever else the files hold of it is not read, but for INT4
        and for FP8 whose piece does not begin and end with blocks.
        """
        holder = self.holders[name]
        part = () if holder == name else self.layout.slots[name].index
        if self.files.info[holder].dtype == "U8":
            return dequantize_int4(self.files.read(holder), self._scale(holder), dtype, self.group)[piece]
        if not self._is_fp8(holder):
            return self.files.read(holder, part)[piece] if part else self.files.read(holder, piece)
        scale = self._scale(holder)
        if not part:
            blocks = self._blocks(piece, self.files.info[holder].shape)
            if blocks is not None:
                return dequantize_fp8(self.files.read(holder, piece), scale[blocks], dtype, self.block)
            return dequantize_fp8(self.files.read(holder), scale, dtype, self.block)[piece]
        expert, *rows = part  # the rows of one half may begin inside a block, so the expert is dequantised whole
        whole = dequantize_fp8(self.files.read(holder, (expert,)), scale[expert], dtype, self.block)
        return whole[tuple(rows)][piece]

    def _blocks(self, piece: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """The FP8 blocks of which a piece consists; None if it cuts through one."""
        found = []
        for cut, size, block in zip(piece, shape, self.block, strict=False):
            if cut.start % block or (cut.stop % block and cut.stop != size):
                return None
            found.append(slice(cut.start // block, -(-cut.stop // block)))
        return tuple(found)

    def read_fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A tensor of `layout` as it is stored, with its scales, if that is FP8 in the published blocks."""
        same_form = self.holders[name] == name and self._is_fp8(name) and self.block == FP8_BLOCK
        return (self.files.read(name), self._scale(name)) if same_form else None

    def _is_fp8(self, holder: str) -> bool:
        return self.files.info[holder].dtype == "F8_E4M3"

    def _scale(self, holder: str) -> Tensor:
        """Scales are all read at once: a weight's may be in another shard, and they are 1/4,000 of the weights."""
        if not self._scales:
            for name in self.files.names_by_file():
                if name.endswith(SCALE_SUFFIX):
                    self._scales[name] = self.files.read(name).to(torch.float32, copy=True)
        return self._scales[holder + SCALE_SUFFIX]

    # ---- checks -----------------------------------------------------------------------------------------------------
    def _holds_mtp(self, config: ModelConfig) -> bool:
        """Whether any MTP layer is there; a directory written by `transformers` has none, and that is no fault."""
        if config.num_nextn_predict_layers == 0:
            return False
        layers = {layer_number(name) for name in self.files.info if not is_shared_copy(name)}
        if any(layer is not None and layer >= config.num_hidden_layers for layer in layers):
            return True
        logger.warning(
            "%s holds no MTP layer (transformers saves none); the model is built with num_nextn_predict_layers=0.",
            self.directory,
        )
        return False

    def _match(self) -> dict[str, str]:
        holders: dict[str, str] = {}
        unexpected = []
        for holder in self.files.names_by_file():
            if self._skipped(holder):
                continue
            if holder in self.layout.slots:
                names: tuple[str, ...] = (holder,)
            elif holder in self.layout.stacked:
                names = self.layout.stacked[holder][1]
            else:
                unexpected.append(holder)
                continue
            for name in names:
                if name in holders:
                    raise self._error(holder, f"is there twice, for {holders[name]} holds {name} too; keep one form")
                holders[name] = holder
        missing = [name for name in self.layout.slots if name not in holders]
        if unexpected:
            raise self._unexpected(unexpected, missing)
        if missing:
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.directory} lacks {missing[0]}{more}, which its config.json calls for; "
                "fetch the missing shards, or the config.json that belongs to these weights."
            )
        for holder in dict.fromkeys(holders.values()):
            self._check_kind(holder)
        return holders

    def _skipped(self, name: str) -> bool:
        """Scales (they go with their weights), copies of shared tensors, and MTP layers that nobody wants."""
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self.files.info:
            return True
        layer = layer_number(name)
        beyond_trunk = layer is not None and layer >= self.config.num_hidden_layers
        return beyond_trunk and (self._trunk_only or is_shared_copy(name))

    def _unexpected(self, unexpected: list[str], missing: list[str]) -> CheckpointError:
        name = unexpected[0]
        more = f" (and {len(unexpected) - 1:,} more)" if len(unexpected) > 1 else ""
        if name.endswith(SCALE_SUFFIX):
            return self._error(name, f"is a scale without its weight{more}; fetch the shard that holds the weight")
        layer = layer_number(name)
        layers = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
        if layer is not None and layer >= layers:
            return self._error(
                name,
                f"belongs to layer {layer}{more}, but config.json has num_hidden_layers="
                f"{self.config.num_hidden_layers} and num_nextn_predict_layers={self.config.num_nextn_predict_layers}; "
                "correct config.json, or load with mtp=False if these are MTP layers",
            )
        beside = [m for m in missing if layer_number(m) == layer][:2000]
        return self._error(
            name, f"is not a tensor of this model{more}; take weights and config.json from one model", beside
        )

    def _check_kind(self, name: str) -> None:
        slot = self.layout.slots[name] if name in self.layout.slots else self.layout.stacked[name][0]
        info = self.files.info[name]
        if info.dtype == "U8" and name in self.layout.slots:
            self._check_int4(name, slot.shape)
            return
        if info.shape != slot.shape:
            raise self._error(
                name,
                f"has shape {list(info.shape)}, but config.json makes it {list(slot.shape)}; "
                "take weights and config.json from one model",
            )
        if info.dtype not in FLOAT_DTYPES or info.dtype == "F8_E8M0":
            raise self._error(
                name, f"is stored as {info.dtype}; a weight must be one of F32, BF16, F16, F64 or F8_E4M3 (with scales)"
            )
        scale = self.files.info.get(name + SCALE_SUFFIX)
        if info.dtype != "F8_E4M3":
            if scale is not None:
                raise self._error(
                    name, f"is {info.dtype}, yet {name + SCALE_SUFFIX} scales it; the files are half converted"
                )
            return
        if scale is None:
            raise self._error(name, f"is FP8, but {name + SCALE_SUFFIX} is missing; fetch the shard that holds it")
        expected = fp8_scale_shape(slot.shape, self.block) if len(slot.shape) > 1 else None
        if expected is None or scale.shape != expected or scale.dtype not in FLOAT_DTYPES:
            raise self._error(
                name + SCALE_SUFFIX,
                f"is {scale.dtype} {list(scale.shape)}; FP8 blocks of {self.block[0]} x {self.block[1]} need "
                f"F32 {list(expected or ())}: correct weight_block_size in config.json or fetch the tensor again",
            )

    def _check_int4(self, name: str, shape: tuple[int, ...]) -> None:
        scale = self.files.info.get(name + SCALE_SUFFIX)
        packed, scales = int4_shapes(shape, self.group)
        if self.files.info[name].shape != packed or scale is None or (scale.dtype, scale.shape) != ("BF16", scales):
            raise self._error(
                name,
                f"is packed INT4, which for a matrix {list(shape)} in groups of {self.group} is U8 {list(packed)} with "
                f"{name + SCALE_SUFFIX} BF16 {list(scales)}; convert it again, or correct group_size in config.json",
            )

    def _error(self, name: str, problem: str, near: list[str] | None = None) -> CheckpointError:
        file = self.directory / self.files.info[name].file
        return CheckpointError(f"{file}: {name} {problem}.{did_you_mean(name, near or [])}")


def model_layout(config: ModelConfig) -> Layout:
    """The layout of `GLM5(config)`, from its modules built without memory."""
    shapes = {name: tensor.shape for name, tensor in GLM5(config, device="meta").state_dict().items()}
    return build_layout(shapes, config.num_hidden_layers)
