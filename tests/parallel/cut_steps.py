"""Training steps of a tiny model under any plan, with every term of every stage's loss, compared with one process.

The model has IndexShare and four heads, its MTP module runs three times; the rows hold documents that cross every
border between ranks, and padding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from glm5.data import IGNORED, Batch
from glm5.model import GLM5
from glm5.parallel import ParallelPlan
from glm5.parallel.apply import parallelize
from glm5.parallel.mesh import Mesh, open_mesh
from glm5.train.losses import Counts, Loss, count, language_loss

ROWS, VOCABULARY = 4, 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 3, "indexer_types": ("full", "shared", "full"),
    "num_attention_heads": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One step: what is cut how, and what is computed."""

    plan: ParallelPlan = field(default_factory=ParallelPlan)
    attention: str = "sparse"
    length: int = 30
    changes: dict[str, Any] = field(default_factory=dict)
    positions: int = 1 << 20
    """Of which logits are held at once."""


def batch(length: int) -> Batch:
    """Four rows: two documents in most, padding that differs from row to row."""
    ids = torch.randint(0, VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(3))
    segments = torch.zeros_like(ids)
    for i, (cut, end) in enumerate(((0.3, 1.0), (0.57, 0.93), (1.0, 1.0), (0.4, 0.54))):
        segments[i, int(cut * length) :] = 1
        segments[i, int(end * length) :] = -1
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    targets = F.pad(torch.where(same, ids[:, 1:], IGNORED), (0, 1), value=IGNORED)
    return Batch(ids, targets, segments)


def rows_of(whole: Batch, rows: slice) -> Batch:
    return Batch(whole.input_ids_BT[rows], whole.targets_BT[rows], whole.segment_ids_BT[rows])


def steps(cases: list[Case]) -> list[dict[str, Any]]:
    """The result of every case, the same on all processes of the world."""
    return [step(case) for case in cases]


def step(case: Case) -> dict[str, Any]:
    mesh = open_mesh(case.plan)
    model = tiny_model(**{**SHAPE, **case.changes}).train()
    model.mtp_steps = 3
    parallelize(model, mesh)
    rows = rows_of(batch(case.length), slice(mesh.index("data"), None, mesh.size("data")))
    counts = Counts(mesh.total(count(rows, 3).values, "data"))

    def loss(model: GLM5, rows: Batch) -> tuple[Tensor, Loss]:
        found = language_loss(
            model, rows, counts, attention=case.attention, mtp_weight=0.3, balance_weight=0.01, indexer_weight=1.0,
            most=case.positions * VOCABULARY,
        )  # fmt: skip
        return found.total, dataclasses.replace(found, total=found.total.detach())

    if case.plan.pipeline > 1:
        micro = [rows_of(rows, slice(i, i + 1)) for i in range(len(rows.input_ids_BT))]
        shape = (1, model.rows.part(micro[0].input_ids_BT).shape[1], model.config.hidden_size)
        kept = model.pipeline.step(model, micro, loss, shape)
    else:
        total, found = loss(model, rows)
        total.backward()
        kept = [found]
    return gathered(model, kept, mesh)


def gathered(model: GLM5, kept: list[Loss], mesh: Mesh) -> dict[str, Any]:
    """Loss, parts, loads and whole gradients of all processes."""
    loads: dict[int, Tensor] = {}
    for record in (record for found in kept for record in found.router):
        loads[record.layer] = loads.get(record.layer, torch.zeros(())) + record.load_E
    loads = {layer: mesh.total(load_E, "tokens") for layer, load_E in loads.items()}
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    total = mesh.total(torch.stack([found.total for found in kept]).sum(), "tokens")
    if mesh.size("pipeline") > 1:
        stages = [None] * mesh.size("pipeline")
        torch.distributed.all_gather_object(stages, (loads, gradients), group=mesh.group("pipeline"))
        total = mesh.total(total, "pipeline")
        loads = {layer: load_E for stage in stages for layer, load_E in stage[0].items()}
        for stage in stages:
            for name, gradient in stage[1].items():
                assert torch.equal(gradients.setdefault(name, gradient), gradient), name
    return {"loss": total, "loads": loads, "gradients": gradients}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_same_step(result: dict[str, Any], expected: dict[str, Any], case: Case, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-6, atol=0)
    assert result["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (result["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < tolerance, (case, name, error)
    for layer, load in expected["loads"].items():
        assert torch.equal(result["loads"][layer], load), (case, layer)
