"""Matrices that are cut over processes, brought together for Muon and cut again.

Zero-redundant, as in the GLM-5 report (appendix A): where a parameter is cut by rows, each matrix is sent to one
process that orthogonalises it alone, and its rows go back: two all-to-alls, and no matrix is orthogonalised twice
within a group. Heads and experts that lie whole on a process are not sent at all. Parameters that are cut in another
way (rows of experts, or over two axes at once) are gathered on every process that has a part. Left out: sharing work
between the copies of HSDP, overlap with the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

Work = Callable[[list[tuple[Any, Tensor]]], list[Tensor]]
"""What is done to tensors, given with their splits."""


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


@dataclass(frozen=True)
class Cut:
    """A parameter whose matrices are cut apart."""

    parameter: DTensor
    group: dist.ProcessGroup
    """The processes of the (first) axis that cuts matrices apart."""
    by_rows: bool
    """One axis alone cuts it, by rows."""
    whole: tuple[Placement, ...]
    """Placements in which every process has whole matrices."""

    @classmethod
    def of(cls, parameter: Tensor, unit: int | None) -> Cut | None:
        """How matrices of `unit` rows (None: of all rows) are cut apart; None when each is whole on its process."""
        if not isinstance(parameter, DTensor):
            return None
        mesh = parameter.device_mesh
        axes = [i for i, p in enumerate(parameter.placements) if not p.is_replicate() and mesh.size(i) > 1]
        if not axes:
            return None
        whole: list[Placement] = list(parameter.placements)
        rows = [i for i in axes if parameter.placements[i].dim == 0]  # type: ignore[attr-defined]
        processes = 1
        for i in rows:
            processes *= mesh.size(i)
        clean = unit == 1 or (unit is not None and parameter.shape[0] % (unit * processes) == 0)
        bad = [i for i in axes if i not in rows or not clean]
        if not bad:
            return None
        for i in bad:
            whole[i] = Replicate()
        return cls(parameter, mesh.get_group(bad[0]), by_rows=bad == axes == rows[:1], whole=tuple(whole))

    @staticmethod
    def rows_of(parameter: Tensor) -> slice | Tensor:
        """The rows of a matrix that this process holds."""
        if not isinstance(parameter, DTensor):
            return slice(None)
        numbers = torch.arange(parameter.shape[0], device=parameter.device).unsqueeze(1).expand(parameter.shape)
        cut = DTensor.from_local(numbers, parameter.device_mesh, run_check=False)
        return cut.redistribute(placements=parameter.placements).to_local()[:, 0]

    def edges(self) -> list[int]:
        """Rows of each process of the group, as `torch.chunk` cuts them."""
        rows, processes = self.parameter.shape[0], self.group.size()
        size = -(-rows // processes)
        return [max(0, min(size, rows - i * size)) for i in range(processes)]


def gathered(cut: Cut, part: Tensor, split: Any, work: Work) -> Tensor:
    """`work` on whole matrices, done by every process that has a part of them; gives this process's part."""
    mesh, placements = cut.parameter.device_mesh, cut.parameter.placements
    shape, stride = cut.parameter.shape, cut.parameter.stride()
    direction = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
    done = work([(split, direction.redistribute(placements=cut.whole).to_local())])[0]
    result = DTensor.from_local(done, mesh, cut.whole, run_check=False, shape=shape, stride=stride)
    return result.redistribute(placements=placements).to_local()


def exchanged(cuts: list[Cut], parts: list[Tensor], splits: Sequence[Any], work: Work) -> list[Tensor]:
    """`work` on whole matrices, each done by one process of the group; gives this process's rows of each."""
    group = cuts[0].group
    rank, processes = group.rank(), group.size()
    owners = _owners([cut.parameter for cut in cuts], processes)
    edges = [cut.edges() for cut in cuts]
    width = [cut.parameter.shape[1] for cut in cuts]
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    owned = [[i for i, owner in enumerate(owners) if owner == process] for process in range(processes)]

    outgoing = torch.cat([parts[i].flatten() for members in owned for i in members])
    sends = [sum(parts[i].numel() for i in members) for members in owned]
    receives = [sum(edges[i][process] * width[i] for i in mine) for process in range(processes)]
    arrived = outgoing.new_empty(sum(receives))
    dist.all_to_all_single(arrived, outgoing, receives, sends, group=group)
    pieces: dict[int, list[Tensor]] = {i: [] for i in mine}
    for block, process in zip(arrived.split(receives), range(processes), strict=True):
        for i, piece in zip(mine, block.split([edges[i][process] * width[i] for i in mine]), strict=True):
            pieces[i].append(piece.view(-1, width[i]))
    done = dict(zip(mine, work([(splits[i], torch.cat(pieces[i])) for i in mine]), strict=True))

    cut_again = [done[i].split(edges[i]) for i in mine]
    leaving = [rows[process].flatten() for process in range(processes) for rows in cut_again]
    returned = torch.empty_like(outgoing)
    dist.all_to_all_single(
        returned, torch.cat(leaving) if leaving else outgoing.new_empty(0), sends, receives, group=group
    )
    results = list(parts)
    order = [i for members in owned for i in members]
    for i, block in zip(order, returned.split([parts[i].numel() for i in order]), strict=True):
        results[i] = block.view_as(parts[i])
    return results


def _owners(parameters: list[DTensor], processes: int) -> list[int]:
    """Who orthogonalises which matrix: the largest first, each to the process with the least work so far."""
    cost = [p.numel() * min(p.shape) for p in parameters]
    load, owners = [0] * processes, [0] * len(parameters)
    for i in sorted(range(len(parameters)), key=lambda i: -cost[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += cost[i]
    return owners
