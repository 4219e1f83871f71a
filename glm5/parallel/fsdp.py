"""FSDP2 and HSDP laid over the model from outside: parameters, gradients and optimiser states are cut over processes.

PyTorch's `fully_shard` (per-parameter sharding; ZeRO stage 3, arXiv 1910.02054). Every decoder layer is a unit that is
gathered while it runs. Routed experts are units of their own, because expert parallelism cuts them over fewer
processes; indexers too, because in the first DSA stage no gradient passes through their layer, which would gather them
again. An MTP module is called through `draft`, around which no hook runs: its attention is a unit, its other weights
belong to the root. Gradients are *summed*: a loss already divides by the counts of all processes.
Left out: offload to the CPU, prefetch by hand.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from glm5.model import GLM5, RouterRecord
from glm5.model.mla import MLA, Pass
from glm5.model.moe import MoE
from glm5.parallel.mesh import Mesh


def shard(model: GLM5, mesh: Mesh, *, gather_dtype: torch.dtype | None = None) -> None:
    """Cuts `model` in place over the shard axis of `mesh`, and keeps copies of the cuts over `data_replicate`.

    gather_dtype: weights are cast to it before they are gathered (bf16 halves the traffic), gradients are summed in
    fp32; the router and the indexer's head weights stay in fp32. None gathers and computes in the weights' dtype.

    All processes run passes of equal length: one whose row leaves no choice to the indexer does not gather its weights.
    """
    plan = mesh.plan
    if mesh.shards is None or mesh.experts is None or plan.data * plan.context == 1:
        return
    copies = ("data_replicate",) if plan.data_replicate > 1 else ()
    # The indexer returns views, and nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    dense = mesh.shards[(*copies, "shard")]
    experts = mesh.experts[(*copies, "expert_shard")]
    # Inputs are not cast: activations have the dtype of the embedding, and what was widened on purpose stays wide.
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    usual = exact
    if gather_dtype is not None:
        usual = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    for layer in [*model.model.layers, *model.mtp]:
        indexer = layer.self_attn.indexer
        if indexer is not None:
            if gather_dtype is not None:
                _unit(indexer.weights_proj, dense, exact, keep=True)
            _unit(indexer, dense, usual, keep=True)
        if isinstance(layer.mlp, MoE):
            if gather_dtype is not None:
                _unit(layer.mlp.gate, dense, exact)
            _unit(layer.mlp.experts, experts, usual)
    for layer in model.model.layers:
        _unit(layer, dense, usual)
    for module in model.mtp:
        assert isinstance(module.self_attn, MLA)
        _unit(module.self_attn, dense, usual)
    _unit(model, dense, usual)
    register_fsdp_forward_method(model, "draft")


def _unit(module: nn.Module, over: DeviceMesh, policy: MixedPrecisionPolicy, *, keep: bool | None = None) -> None:
    """Makes `module` one unit. keep: its weights stay gathered between forward and backward."""
    module.register_forward_pre_hook(_show_inputs, with_kwargs=True)  # hooks run in this order: hide, FSDP's, show
    module.register_forward_hook(_hide_outputs)
    fully_shard(
        module,
        mesh=over,
        mp_policy=policy,
        reshard_after_forward=None if keep is None else not keep,
        shard_placement_fn=lambda parameter: _placement(parameter, over),
    )
    module.register_forward_pre_hook(_hide_inputs, with_kwargs=True, prepend=True)
    module.register_forward_hook(_show_outputs)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _placement(parameter: nn.Parameter, over: DeviceMesh) -> Shard:
    """Whole experts where there are enough for every process, else their rows; everything else by rows."""
    processes = over.size(over.ndim - 1)
    if parameter.ndim == 3 and isinstance(parameter, DTensor) and parameter.to_local().shape[0] % processes:
        return Shard(1)
    return Shard(0)


# ---- what FSDP must not see -----------------------------------------------------------------------------------------
class _Hidden:
    """A box that FSDP does not open.

    FSDP searches dataclasses for tensors. It would copy a `Pass`, which the layers share and write to, and it would
    gather every layer at once at the start of the backward pass, because the balance terms of all layers come first.
    """

    def __init__(self, value: Pass | RouterRecord) -> None:
        self.value = value


def _hidden(value: Any) -> Any:
    return _Hidden(value) if isinstance(value, Pass | RouterRecord) else value


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, _Hidden) else value


def _hide_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tuple(map(_hidden, args)), kwargs


def _show_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tuple(map(_shown, args)), kwargs


def _hide_outputs(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tuple(map(_hidden, output)) if isinstance(output, tuple) else output


def _show_outputs(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tuple(map(_shown, output)) if isinstance(output, tuple) else output
