"""Training steps of a tiny model under any plan, with every term of every stage's loss, compared with one process.

The model has IndexShare and four heads, its MTP module runs three times; the rows hold documents that cross every
border between ranks, and padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from glm5.model import GLM5
from glm5.parallel import ParallelPlan
from glm5.parallel.context import apply_context_parallel
from glm5.parallel.mesh import Mesh, open_mesh
from glm5.parallel.tensor import apply_tensor_parallel

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


def batch(length: int) -> tuple[Tensor, Tensor]:
    """Ids and segments [4, length]: two documents a row in most rows, padding that differs from row to row."""
    ids = torch.randint(0, VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(3))
    segments = torch.zeros_like(ids)
    for i, (cut, end) in enumerate(((0.3, 1.0), (0.57, 0.93), (1.0, 1.0), (0.4, 0.54))):
        segments[i, int(cut * length) :] = 1
        segments[i, int(end * length) :] = -1
    return ids, segments


def steps(cases: list[Case]) -> list[dict[str, Any]]:
    """The result of every case, the same on all processes of the world."""
    return [step(case) for case in cases]


def step(case: Case) -> dict[str, Any]:
    mesh = open_mesh(case.plan)
    model = tiny_model(**{**SHAPE, **case.changes}).train()
    model.mtp_steps = 3
    if mesh.axes is not None and case.plan.tensor > 1:
        apply_tensor_parallel(model, mesh.axes["tensor"])
    if case.plan.context > 1:
        apply_context_parallel(model, mesh.group("context"))
    loss, loads = backward(model, mesh, case)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for gradient in gradients.values():
        part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        part.copy_(mesh.total(part, "tokens"))
    return {"loss": loss, "loads": loads, "gradients": {name: whole(g) for name, g in gradients.items()}}


def backward(model: GLM5, mesh: Mesh, case: Case) -> tuple[Tensor, dict[int, Tensor]]:
    """Next token, three drafts, balance and indexer KL of this process's tokens, each divided by the counts of all."""
    ids, segments = (x[mesh.index("data") :: mesh.size("data")] for x in batch(case.length))
    output = model(ids, None, segments, attention=case.attention, collect={"router", "mtp", "indexer_kl"})
    total = torch.zeros(())
    for ahead, logits in enumerate((output.logits, *output.mtp_logits), start=1):
        same = (segments[:, ahead:] == segments[:, :-ahead]) & (segments[:, ahead:] >= 0)
        targets = F.pad(torch.where(same, ids[:, ahead:], -100), (0, ahead), value=-100)
        entropy = F.cross_entropy(logits.flatten(0, 1), model.rows.part(targets).flatten(), reduction="sum")
        total = total + entropy / mesh.total(same.sum(), "data") * (1.0 if ahead == 1 else 0.15)
    total = total + 0.01 * torch.stack([record.balance for record in output.router]).sum() * len(ids) / ROWS
    valid = (segments >= 0).sum()
    total = total + torch.stack(list(output.indexer_kl.values())).mean() * valid / mesh.total(valid, "data")
    total.backward()
    loads: dict[int, Tensor] = {}
    for record in output.router:
        loads[record.layer] = loads.get(record.layer, torch.zeros(())) + mesh.total(record.load_E, "tokens")
    return mesh.total(total.detach(), "tokens"), loads


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
