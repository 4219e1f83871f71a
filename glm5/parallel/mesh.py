"""The processes of a run as a mesh with named axes; started by `torchrun`, by nothing of ours.

`processes()` joins the group that torchrun's environment describes, `open_mesh(plan)` lays the plan's axes over it. A
world of one process has no group: every question has its trivial answer, and no collective is called.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from glm5.errors import GLM5Error
from glm5.parallel.plan import ParallelPlan

Result = TypeVar("Result")
AXES = ("pipeline", "data_replicate", "data_shard", "context", "tensor")
JOINED = {
    "data": ("data_replicate", "data_shard"),
    "shard": ("data_shard", "context"),
    "tokens": ("data_replicate", "data_shard", "context"),
}
"""Axes made of others: different rows; where parameters are cut; where a loss is summed."""


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Inside the block, the processes that torchrun started form a group (gloo on CPUs, NCCL beside it on GPUs)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Processes of the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def world_rank() -> int:
    """This process's number in the group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_first(work: Callable[[], Result]) -> Result | None:
    """Does `work` on the first process while the others wait; an error that a user can mend is raised on all.

    Gives the result of `work`, and None on the other processes.
    """
    if world_size() == 1:
        return work()
    result: Result | None = None
    problems: list[GLM5Error | None] = [None]
    if world_rank() == 0:
        try:
            result = work()
        except GLM5Error as error:
            problems = [error]
    dist.broadcast_object_list(problems)
    if problems[0] is not None:
        raise problems[0]
    return result


@dataclass(frozen=True)
class Mesh:
    """The axes of a plan over the processes. `None` meshes and groups: a world of one process."""

    plan: ParallelPlan
    rank: int = 0
    axes: DeviceMesh | None = None
    """`AXES`."""
    shards: DeviceMesh | None = None
    """(pipeline, data_replicate, shard, tensor): what FSDP and HSDP cut over."""
    experts: DeviceMesh | None = None
    """(pipeline, data_replicate, expert_shard, expert, tensor): the shard axis cut once more."""
    _joined: dict[str, DeviceMesh] = field(default_factory=dict)

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.plan.devices

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device("cpu" if self.axes is None else self.axes.device_type)

    def size(self, axis: str) -> int:
        """Processes along an axis of `AXES` or `JOINED`, or along "expert"."""
        group = self.group(axis)
        return 1 if group is None else group.size()

    def index(self, axis: str) -> int:
        """This process's place along an axis, from 0."""
        group = self.group(axis)
        return 0 if group is None else group.rank()

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The processes along an axis that this one belongs to."""
        if self.axes is None or self.experts is None:
            return None
        if axis == "world":
            return dist.group.WORLD
        if axis in self._joined:
            return self._joined[axis].get_group()
        return (self.experts if axis.startswith("expert") else self.axes).get_group(axis)

    def total(self, x: Tensor, axis: str) -> Tensor:
        """The sum of `x` over an axis, as a new tensor; without gradient."""
        group = self.group(axis)
        if group is None or group.size() == 1:
            return x
        x = x.detach().clone()
        dist.all_reduce(x, group=group)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process of the world."""
        return bool(self.total(torch.tensor(float(flag)), "world").item())


def open_mesh(plan: ParallelPlan) -> Mesh:
    """The mesh of `plan`. Raises `InputError` when it is for another number of processes than run."""
    plan.check_world(world_size())
    if plan.devices == 1:
        return Mesh(plan)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = init_device_mesh(device, (plan.devices,), mesh_dim_names=("world",))

    def view(**sizes: int) -> DeviceMesh:
        return world._unflatten(0, tuple(sizes.values()), tuple(sizes))

    axes = view(**{name: getattr(plan, name) for name in AXES})
    outer = {"pipeline": plan.pipeline, "data_replicate": plan.data_replicate}
    shards = view(**outer, shard=plan.shards, tensor=plan.tensor)
    cut = {"expert_shard": plan.shards // plan.expert, "expert": plan.expert}
    experts = view(**outer, **cut, tensor=plan.tensor)
    joined = {name: axes[parts]._flatten(name) for name, parts in JOINED.items()}
    return Mesh(plan, dist.get_rank(), axes, shards, experts, joined)
