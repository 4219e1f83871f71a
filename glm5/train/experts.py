"""What the loop reads from and does to the routers: loads of the experts, their balance, the correction biases."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from glm5.model import GLM5, RouterRecord

Loads = dict[int, torch.Tensor]
"""Tokens per expert [E] of every sparse layer by its number; MTP modules count on after the trunk."""


def router_biases(model: GLM5) -> dict[int, torch.Tensor]:
    """The correction bias of every sparse layer by its number."""
    layers = [*model.model.layers, *model.mtp]
    gates = {layer.layer: getattr(layer.mlp, "gate", None) for layer in layers}
    return {i: gate.e_score_correction_bias for i, gate in gates.items() if gate is not None}


def expert_loads(records: Iterable[RouterRecord], loads: Loads | None = None) -> Loads:
    """`loads` with the records added; a layer that ran several times (MTP, micro-batches) is counted each time."""
    loads = dict(loads or {})
    for record in records:
        loads[record.layer] = loads.get(record.layer, 0) + record.load_E
    return loads


def busiest_expert(loads: Loads) -> dict[str, float]:
    """The largest share of any expert, as a multiple of an even share (1.0 is perfect balance)."""
    shares = [(load_E.max() / load_E.mean()).item() for load_E in loads.values()]
    return {"busiest_expert": max(shares)} if shares else {}
