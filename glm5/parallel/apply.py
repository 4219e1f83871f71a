"""Lays a whole plan over a single-device model, each axis in the order that the next one needs.

Pipeline first (what other stages hold is never cut), whole experts before the ranks that would cut them, FSDP last: it
cuts the cuts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from glm5.model import GLM5
from glm5.parallel.context import apply_context_parallel
from glm5.parallel.expert import cut_experts
from glm5.parallel.fsdp import shard
from glm5.parallel.mesh import Mesh, world_rank
from glm5.parallel.pipeline import PipelinePart, apply_pipeline_parallel
from glm5.parallel.tensor import apply_tensor_parallel


def parallelize(model: GLM5, mesh: Mesh, *, gather_dtype: torch.dtype | None = None) -> None:
    """Cuts `model`, whose weights are the same on all processes, in place after `mesh.plan`.

    gather_dtype: see `fsdp.shard`. Raises InputError for a plan that does not fit the model.
    """
    plan = mesh.plan
    plan.check(model.config)
    if mesh.shards is None:
        return
    stages = mesh.group("pipeline")
    if plan.pipeline > 1 and stages is not None:
        apply_pipeline_parallel(model, stages)
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
    group = model.pipeline.group if isinstance(model, PipelinePart) else None
    first = world_rank() == 0 if group is None else dist.get_global_rank(group, 0) == 0
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            whole[name] = full.detach().cpu()
    if group is None or not first:
        return whole
    stages: list[dict[str, torch.Tensor] | None] = [None] * group.size()
    dist.gather_object(whole, stages if world_rank() == 0 else None, dst=0, group=group)
    return {name: tensor for stage in stages if stage is not None for name, tensor in stage.items()}
