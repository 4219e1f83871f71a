"""INT4 quantisation-aware training, laid over the model from outside (GLM-5 report, section 3.1: in SFT).

The forward pass sees every chosen matrix as `quantize_int4` and `dequantize_int4` give it, bit for bit the weights that
offline conversion makes of the finished run; the gradient goes straight through to the full weights, which the
optimiser moves and the checkpoint keeps. `experts`: the routed experts, nine tenths of the weights. `matrices`: the
projections of attention and the dense and shared MLPs as well. Never: embedding, head, router, norms, the indexer, the
MTP module's `eh_proj`. Left out: quantised activations.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from glm5.model import GLM5
from glm5.ops.experts import Experts
from glm5.ops.linear import Linear
from glm5.ops.quant import fake_quantize_int4

Chosen = Literal["experts", "matrices"]
KEPT = ("lm_head", ".indexer.", "eh_proj")


def quantize_aware(model: GLM5, chosen: Chosen, group: int) -> tuple[str, ...]:
    """Makes the forward pass of `model` see INT4; gives the names of the weights that it sees so."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            _replace_experts(module, group)
            names += [f"{name}.gate_up_proj", f"{name}.down_proj"]
        elif isinstance(module, Linear) and chosen == "matrices" and not any(part in f"{name}." for part in KEPT):
            _replace_linear(module, group)
            names.append(f"{name}.weight")
    return tuple(names)


def _replace_linear(module: Linear, group: int) -> None:
    def effective_weight() -> Tensor:
        return fake_quantize_int4(module.weight, group)

    def forward(x: Tensor) -> Tensor:
        return F.linear(x, effective_weight())

    module.effective_weight = effective_weight  # type: ignore[method-assign]
    module.forward = forward  # type: ignore[method-assign]


def _replace_experts(module: Experts, group: int) -> None:
    def effective_weights() -> tuple[Tensor, Tensor]:
        return fake_quantize_int4(module.gate_up_proj, group), fake_quantize_int4(module.down_proj, group)

    module.effective_weights = effective_weights  # type: ignore[method-assign]


def full_weights(model: GLM5) -> None:
    """Takes `quantize_aware` back: the forward pass sees the weights as they are."""
    for module in model.modules():
        if isinstance(module, Experts | Linear):
            for name in ("forward", "effective_weight", "effective_weights"):
                module.__dict__.pop(name, None)
