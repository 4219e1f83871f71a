"""One training step of a tiny model on a mesh: its loss, its gradients and its loads, whole again on every process."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from glm5.parallel import ParallelPlan
from glm5.parallel.expert import cut_experts
from glm5.parallel.fsdp import shard
from glm5.parallel.mesh import Mesh, open_mesh

ROWS, LENGTH, VOCABULARY = 4, 24, 97


def rows() -> tuple[Tensor, Tensor]:
    """Ids and segments [4, 24]: documents of several lengths, and padding that differs from row to row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    segments = torch.zeros_like(ids)
    for i, (cut, end) in enumerate(((9, 24), (5, 20), (24, 24), (12, 15))):
        segments[i, cut:] = 1
        segments[i, end:] = -1
    return ids, segments


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def steps(plan: ParallelPlan, gather_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Loss, gradients and loads of every kind of step: dense, sparse, and of the indexers alone."""
    mesh = open_mesh(plan)
    model = tiny_model().train()
    model.mtp_steps = 2
    cut_experts(model, mesh)
    shard(model, mesh, gather_dtype=gather_dtype)
    results = {}
    for kind in ("dense", "sparse", "indexer"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kind != "indexer" or ".indexer." in name)
        loss, loads = backward(model, mesh, "dense" if kind == "indexer" else kind, only_kl=kind == "indexer")
        gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        results[kind] = {"loss": loss, "loads": loads, "gradients": gradients}
        model.zero_grad(set_to_none=True)
    return results


def backward(model: Any, mesh: Mesh, attention: str, *, only_kl: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
    """Next token, MTP, balance and indexer KL of this process's rows, each divided by the counts of all."""
    ids, segments = (x[mesh.index("data") :: mesh.size("data")] for x in rows())
    output = model(ids, None, segments, attention=attention, collect={"router", "mtp", "indexer_kl"})
    valid = (segments >= 0).sum()
    total = torch.stack(list(output.indexer_kl.values())).mean() * valid / mesh.total(valid, "data")
    if not only_kl:
        for ahead, logits in enumerate((output.logits, *output.mtp_logits), start=1):
            same = (segments[:, ahead:] == segments[:, :-ahead]) & (segments[:, ahead:] >= 0)
            targets = torch.where(same, ids[:, ahead:], -100)
            part = F.cross_entropy(logits[:, :-ahead].flatten(0, 1), targets.flatten(), reduction="sum")
            total = total + part / mesh.total(same.sum(), "data") * (1.0 if ahead == 1 else 0.15)
        balance = torch.stack([record.balance for record in output.router]).sum()
        total = total + 0.01 * balance * len(ids) / ROWS
    total.backward()
    loads: dict[int, Tensor] = {}
    for record in output.router:
        loads[record.layer] = loads.get(record.layer, 0) + mesh.total(record.load_E, "data")
    return mesh.total(total.detach(), "data"), loads
