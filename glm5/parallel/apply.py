"""Lays a whole plan over a single-device model, each axis in the order that the next one needs.

Pipeline first (what other stages hold is never cut), whole experts before the ranks that would cut them, FSDP last: it
cuts the cuts.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from glm5.model import GLM5
from glm5.parallel.context import apply_context_parallel
from glm5.parallel.expert import cut_experts
from glm5.parallel.fsdp import shard
from glm5.parallel.mesh import Mesh, world_rank
from glm5.parallel.pipeline import apply_pipeline_parallel
from glm5.parallel.tensor import apply_tensor_parallel


def parallelize(model: GLM5, mesh: Mesh, *, gather_dtype: torch.dtype | None = None) -> None:
    """Cuts `model`, whose weights are the same on all processes, in place after `mesh.plan`.

    gather_dtype: see `fsdp.shard`. Raises InputError for a plan that does not fit the model.
    """
    plan = mesh.plan
    plan.check(model.config)
    if mesh.shards is None:
        return
    if plan.pipeline > 1:
        apply_pipeline_parallel(model, mesh.index("pipeline"), plan.pipeline)
    cut_experts(model, mesh)
    if plan.tensor > 1:
        apply_tensor_parallel(model, mesh.shards["tensor"])
    group = mesh.group("context")
    if plan.context > 1 and group is not None:
        apply_context_parallel(model, group)
    shard(model, mesh, gather_dtype=gather_dtype)


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights and buffers of a cut model as whole tensors on the CPU of the first process; empty on the others."""
    whole = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world_rank() == 0:
            whole[name] = full.detach().cpu()
    return whole
