"""A frozen base in INT4 under adapters (QLoRA, arXiv 2305.14314, with this project's own format): 4.5 bits a weight.

The chosen matrices are stored as `quantize_int4` packs them and made whole where they are used; nothing trains but the
adapters. A linear weight is made anew in the backward pass, so no whole copy waits for it; experts are made whole for
the length of a pass. Left as they are: embedding, head, router, norms, indexers and the MTP module's `eh_proj`, as in
quantisation-aware training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5.ops.experts import Experts
from glm5.ops.linear import Linear
from glm5.ops.quant import dequantize_int4, quantize_int4

KEPT = ("lm_head", ".indexer.", "eh_proj")


def quantize_base(model: nn.Module) -> tuple[str, ...]:
    """Replaces the matrices of `model`, adapters kept, by frozen INT4 ones; gives the names of the modules."""
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in (Linear, Experts) and not any(part in f"{name}." for part in KEPT)
    ]
    for name, module in chosen:
        model.set_submodule(name, Int4Experts(module) if isinstance(module, Experts) else Int4Linear(module))
    return tuple(name for name, _ in chosen)


def unpack_base(model: nn.Module) -> None:
    """The way back: the same rounded weights, whole and frozen, adapters kept. For decoding, where each step would make
    all of them whole again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int4Linear | Int4Experts):
            model.set_submodule(name, module.unpacked())


class Int4Linear(Linear):
    """A `Linear` whose weight is packed; its adapter is that of the module that it replaces."""

    packed: Tensor
    scale: Tensor

    def __init__(self, module: Linear) -> None:
        nn.Module.__init__(self)
        self.dtype = module.weight.dtype
        _store(self, "", module.weight)
        self.adapter = module.adapter

    def effective_weight(self) -> Tensor:
        weight = dequantize_int4(self.packed, self.scale, self.dtype)
        return weight if self.adapter is None else weight + self.adapter.delta()

    def unpacked(self) -> Linear:
        """The same with its weight whole."""
        weight = dequantize_int4(self.packed, self.scale, self.dtype)
        plain = Linear(0, 0, dtype=self.dtype, device=weight.device)
        plain.weight, plain.adapter = nn.Parameter(weight, requires_grad=False), self.adapter
        return plain

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.packed, self.scale, self.dtype)
        return y if self.adapter is None else y + self.adapter(x)


class Int4Experts(Experts):
    """`Experts` whose weights are packed."""

    gate_up_packed: Tensor
    gate_up_scale: Tensor
    down_packed: Tensor
    down_scale: Tensor

    def __init__(self, module: Experts) -> None:
        nn.Module.__init__(self)
        self.dtype = module.gate_up_proj.dtype
        _store(self, "gate_up_", module.gate_up_proj)
        _store(self, "down_", module.down_proj)
        self.gate_up_adapter, self.down_adapter = module.gate_up_adapter, module.down_adapter

    def effective_weights(self) -> tuple[Tensor, Tensor]:
        found = []
        for part, adapter in (("gate_up_", self.gate_up_adapter), ("down_", self.down_adapter)):
            weight = dequantize_int4(getattr(self, f"{part}packed"), getattr(self, f"{part}scale"), self.dtype)
            found.append(weight if adapter is None else weight + adapter.delta())
        return found[0], found[1]

    def unpacked(self) -> Experts:
        """The same with its weights whole."""
        plain = Experts(0, 0, 0, dtype=self.dtype, device=self.down_scale.device)
        plain.gate_up_proj, plain.down_proj = (
            nn.Parameter(dequantize_int4(packed, scale, self.dtype), requires_grad=False)
            for packed, scale in ((self.gate_up_packed, self.gate_up_scale), (self.down_packed, self.down_scale))
        )
        plain.gate_up_adapter, plain.down_adapter = self.gate_up_adapter, self.down_adapter
        return plain


def _store(module: nn.Module, part: str, weight: Tensor) -> None:
    packed, scale = quantize_int4(weight)
    module.register_buffer(f"{part}packed", packed)
    module.register_buffer(f"{part}scale", scale)


class _Product(torch.autograd.Function):
    """`x @ weight.T` that keeps the packed weight for its gradient to x, not the whole one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.dtype = dtype
        return F.linear(x, dequantize_int4(packed, scale, dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scale = ctx.saved_tensors
        return gradient @ dequantize_int4(packed, scale, ctx.dtype), None, None, None
