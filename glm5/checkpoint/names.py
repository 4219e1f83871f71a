"""Names on disk and names in the model: the Hugging Face layout of GLM-5, per expert, with the MTP layers at the end.

    in the model                                   on disk
    model.layers.3.mlp.experts.gate_up_proj  [E, 2I, D]    model.layers.3.mlp.experts.{e}.gate_proj.weight  [I, D]
                                                           model.layers.3.mlp.experts.{e}.up_proj.weight    [I, D]
    model.layers.3.mlp.experts.down_proj     [E, D, I]     model.layers.3.mlp.experts.{e}.down_proj.weight  [D, I]
    mtp.{j}.<rest>                                         model.layers.{num_hidden_layers + j}.<rest>
    everything else                                        the same name

Files that hold the stacked names instead (`mlp.experts.gate_up_proj`) are read too. Written files are per expert, with
the three matrices of one expert beside each other, so that an expert is one read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size, Tensor

SCALE_SUFFIX = "_scale_inv"
"""The scales of `X.weight` are `X.weight_scale_inv`; those of a stacked `X` are `X_scale_inv`."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MTP = re.compile(r"mtp\.(\d+)\.")
_SHARED_COPY = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
_FP8_WEIGHT = re.compile(
    r".*\.(self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|indexer\.wq_b|indexer\.wk)"
    r"|mlp\.((shared_experts|experts\.\d+)\.)?(gate|up|down)_proj)\.weight"
)


@dataclass(frozen=True)
class Slot:
    """Where one tensor on disk belongs in the model: a whole tensor, or one expert's part of a stacked one."""

    tensor: str
    """Name in the model's `state_dict`."""
    shape: tuple[int, ...]
    """Shape on disk."""
    index: tuple[int | slice, ...] = ()

    def of(self, whole: Tensor) -> Tensor:
        """The view of the model's tensor that this slot fills."""
        return whole[self.index]


@dataclass(frozen=True)
class Layout:
    """Every tensor that a directory must hold, under its name on disk."""

    slots: dict[str, Slot]
    """Per-expert names, in the order in which they are written."""
    stacked: dict[str, tuple[Slot, tuple[str, ...]]]
    """Stacked expert names that may stand on disk instead, and the per-expert names that each replaces."""


def build_layout(shapes: Mapping[str, Size], num_hidden_layers: int) -> Layout:
    """The layout of a model whose `state_dict` has these shapes."""
    slots: dict[str, Slot] = {}
    stacked: dict[str, tuple[Slot, tuple[str, ...]]] = {}
    for name, shape in shapes.items():
        disk_name = _on_disk(name, num_hidden_layers)
        if name.endswith(".mlp.experts.gate_up_proj"):
            stem = disk_name.removesuffix("gate_up_proj")
            down_name = name.removesuffix("gate_up_proj") + "down_proj"
            experts = _expert_slots(stem, name, shape, down_name, shapes[down_name])
            slots.update(experts)
            gate_up = tuple(n for n, slot in experts.items() if slot.tensor == name)
            down = tuple(n for n, slot in experts.items() if slot.tensor == down_name)
            stacked[disk_name] = (Slot(name, tuple(shape)), gate_up)
            stacked[stem + "down_proj"] = (Slot(down_name, tuple(shapes[down_name])), down)
        elif not name.endswith(".mlp.experts.down_proj"):
            slots[disk_name] = Slot(name, tuple(shape))
    return Layout(slots, stacked)


def _expert_slots(stem: str, gate_up: str, gate_up_shape: Size, down: str, down_shape: Size) -> dict[str, Slot]:
    experts, double_width, hidden = gate_up_shape
    width = double_width // 2
    slots = {}
    for e in range(experts):
        slots[f"{stem}{e}.gate_proj.weight"] = Slot(gate_up, (width, hidden), (e, slice(0, width)))
        slots[f"{stem}{e}.up_proj.weight"] = Slot(gate_up, (width, hidden), (e, slice(width, None)))
        slots[f"{stem}{e}.down_proj.weight"] = Slot(down, tuple(down_shape[1:]), (e,))
    return slots


def _on_disk(name: str, num_hidden_layers: int) -> str:
    match = _MTP.match(name)
    return f"model.layers.{num_hidden_layers + int(match[1])}.{name[match.end() :]}" if match else name


def layer_number(disk_name: str) -> int | None:
    """The layer that a tensor on disk belongs to; None for embedding, final norm and head."""
    match = _LAYER.match(disk_name)
    return int(match[1]) if match else None


def is_shared_copy(disk_name: str) -> bool:
    """Whether this is a layer's own copy of the embedding or head: MTP shares the trunk's, so a loader skips it."""
    return _SHARED_COPY.fullmatch(disk_name) is not None


def stored_as_int4(disk_name: str, *, experts_only: bool) -> bool:
    """Whether an INT4 checkpoint packs this tensor: what `glm5.train.qat` trains for, so never the indexer."""
    if experts_only:
        return ".mlp.experts." in disk_name
    return stored_as_fp8(disk_name) and ".indexer." not in disk_name


def stored_as_fp8(disk_name: str) -> bool:
    """Whether an FP8 checkpoint holds this tensor in FP8: attention, indexer, MLP and expert matrices.

    Embedding, head, norms, router, `eh_proj` and the indexer's `weights_proj` stay as they are.
    """
    return _FP8_WEIGHT.fullmatch(disk_name) is not None
