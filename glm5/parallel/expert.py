"""Expert parallel: routed experts are cut over processes, tokens travel to them and back (all-to-all).

GShard (arXiv 2006.16668); GLM-5 report, appendix A. Every process routes its own tokens, sends a row for each chosen
expert to the process that holds it, runs its experts on the rows it was sent, and gets back a row for each that it
sent. Nothing is dropped and no capacity is set: the splits are uneven, their sizes are exchanged first. A row is
multiplied as in one process and the sum over a token's experts keeps its order; the gradients of an expert add up over
rows in another order. Left out: overlap of communication with the shared expert, hierarchical all-to-all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from glm5.errors import InputError
from glm5.model import GLM5
from glm5.model.layer import DecoderLayer
from glm5.model.moe import MoE
from glm5.ops.experts import Experts, run_experts
from glm5.parallel.mesh import Mesh


class ExpertParallel(nn.Module):
    """A provider of routed experts that holds [E / processes] of them; in place of `ops.experts.Experts`.

    Its parameters are DTensors with the names and global shapes of `Experts`, so that checkpoints see the whole.
    """

    def __init__(self, experts: Experts, mesh: Mesh) -> None:
        super().__init__()
        if experts.gate_up_adapter is not None or experts.down_adapter is not None:
            raise InputError("Adapters on routed experts do not go with expert parallelism; merge them, or expert=1.")
        assert mesh.experts is not None
        axis = mesh.experts["expert"]
        self.group = axis.get_group()
        self.processes = axis.size()
        self.experts = len(experts.gate_up_proj)
        for name, whole in experts.named_parameters():
            mine = whole.detach().chunk(self.processes)[self.group.rank()].clone()
            shard = DTensor.from_local(mine, axis, [Shard(0)], run_check=False)
            self.register_parameter(name, nn.Parameter(shard, requires_grad=whole.requires_grad))

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum [N, D] over the chosen experts, as `Experts.forward`."""
        tokens, per_token = chosen_NK.shape
        flat = chosen_NK.flatten()
        order = flat.argsort(stable=True)  # by expert, hence by the process that holds it
        mine = self.experts // self.processes
        sent_PE = flat.bincount(minlength=self.experts).view(self.processes, mine)
        got_PE = torch.empty_like(sent_PE)  # rows that each process has for each of my experts
        dist.all_to_all_single(got_PE, sent_PE, group=self.group)
        sends, receives = sent_PE.sum(1).tolist(), got_PE.sum(1).tolist()

        x_RD = Exchange.apply(x_ND[order // per_token], receives, sends, self.group)
        expert_R = torch.arange(mine, device=flat.device).repeat(self.processes).repeat_interleave(got_PE.flatten())
        y_RD = self._run(x_RD, expert_R)
        y_XD = Exchange.apply(y_RD, sends, receives, self.group)

        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        weights_NK1 = weights_NK.to(x_ND.dtype).unsqueeze(-1)
        return (y_XD[back].view(tokens, per_token, -1) * weights_NK1).sum(1)

    def _run(self, x_RD: Tensor, expert_R: Tensor) -> Tensor:
        """Every row through its expert."""
        gate_up, down = _local(self.gate_up_proj), _local(self.down_proj)
        rows = len(x_RD)
        if rows == 0:  # the weights must get a gradient all the same: the other processes wait for it
            x_RD, expert_R = torch.cat((x_RD, x_RD.new_zeros(1, x_RD.shape[1]))), expert_R.new_zeros(1)
        ones_R1 = x_RD.new_ones(len(x_RD), 1)
        return run_experts(x_RD, expert_R.unsqueeze(1), ones_R1, gate_up, down)[:rows]


class Exchange(torch.autograd.Function):
    """All-to-all of rows with uneven splits; the gradients go back the way the rows came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, receives: list[int], sends: list[int], group: dist.ProcessGroup) -> Tensor:
        """Rows [sum(receives), D] from rows [sum(sends), D]."""
        ctx.splits, ctx.group = (sends, receives), group
        return _exchange(x, receives, sends, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The same with the splits exchanged."""
        sends, receives = ctx.splits
        return _exchange(gradients[0], sends, receives, ctx.group), None, None, None


def _exchange(x: Tensor, receives: list[int], sends: list[int], group: dist.ProcessGroup) -> Tensor:
    y = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(y, x.contiguous(), receives, sends, group=group)
    return y


def _local(weight: nn.Parameter | nn.Module | Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()


def moe_layers(model: GLM5) -> list[MoE]:
    """The mixtures of experts of the trunk and of the MTP modules."""
    layers = [layer for layer in [*model.model.layers, *model.mtp] if isinstance(layer, DecoderLayer)]
    return [layer.mlp for layer in layers if isinstance(layer.mlp, MoE)]


def cut_experts(model: GLM5, mesh: Mesh) -> None:
    """Replaces the routed experts of `model` by those that this process holds."""
    if mesh.plan.expert > 1:
        for moe in moe_layers(model):
            moe.experts = ExpertParallel(moe.experts, mesh)  # type: ignore[assignment]
