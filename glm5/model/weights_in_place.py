"""Where the weights of a model lie, and whether the model still consists of them: what `decode.py` reads.

A decoder that reads memory directly must notice everything that the modules would have noticed: a parameter that was
replaced or moved, a module of another class, a hook, an adapter, a `forward` set on an instance. What changes *inside*
the memory (an optimiser's step, `load_state_dict`, merged adapters) needs no notice: it is read where it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glm5.ops.decoding import Matrix
from glm5.ops.experts import Experts
from glm5.ops.linear import Linear
from glm5.ops.norm import RMSNorm


class Unsuitable(Exception):
    """The model has a part that only its modules know how to run."""


class WeightsInPlace:
    """The memory of the modules that were asked for, and a check that they are still those modules."""

    def __init__(self) -> None:
        self._slots: list[tuple[dict[str, Any], str, object]] = []  # a module's dictionary, a name, what it held
        self._modules: list[tuple[nn.Module, type[nn.Module]]] = []
        self._tensors: list[tuple[Tensor, int, torch.Size]] = []  # with their addresses and shapes
        self._alive: list[Tensor] = []  # the memory outlives a parameter that is given another
        self.products = 0
        """Multiplications that one token takes."""

    def module(self, parent: nn.Module, name: str, kind: type[nn.Module]) -> Any:
        """A submodule, which must be exactly of this kind: a subclass may compute something else."""
        module = parent._modules.get(name)
        if type(module) is not kind:
            raise Unsuitable
        self._modules.append((module, kind))
        self._slots += [(parent._modules, name, module), (module.__dict__, "forward", None)]
        return module

    def tensor(self, module: nn.Module, name: str, *shape: int) -> Matrix:
        """A parameter or buffer of this shape: fp32, on the CPU, without gaps."""
        holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        tensor = holder.get(name)
        if not isinstance(tensor, Tensor) or type(tensor) not in (nn.Parameter, Tensor):
            raise Unsuitable
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise Unsuitable
        if tensor.shape != shape:
            raise Unsuitable
        self._slots.append((holder, name, tensor))
        self._tensors.append((tensor, tensor.data_ptr(), tensor.shape))
        self._alive.append(tensor.detach())
        return Matrix.of(self._alive[-1])

    def linear(self, parent: nn.Module, name: str, outputs: int, inputs: int) -> Matrix:
        """The weight [out, in] of a `Linear` that is nothing but its weight."""
        module = self.module(parent, name, Linear)
        if module.effective_weight() is not module.weight:
            raise Unsuitable
        self._slots += [(module._modules, "adapter", None), (module.__dict__, "effective_weight", None)]
        self.products += outputs * inputs
        return self.tensor(module, "weight", outputs, inputs)

    def experts(self, parent: nn.Module, name: str, shape: tuple[int, int, int], used: int) -> tuple[Matrix, Matrix]:
        """gate_up [E * 2I, D] and down [E * D, I] of `Experts` that are nothing but their weights; shape is E, D, I."""
        module, (experts, width, inner) = self.module(parent, name, Experts), shape
        gate_up, down = module.effective_weights()
        if gate_up is not module.gate_up_proj or down is not module.down_proj:
            raise Unsuitable
        self._slots += [(module._modules, adapter, None) for adapter in ("gate_up_adapter", "down_adapter")]
        self._slots.append((module.__dict__, "effective_weights", None))
        self.products += used * 3 * width * inner
        return (
            self.tensor(module, "gate_up_proj", experts, 2 * inner, width),
            self.tensor(module, "down_proj", experts, width, inner),
        )

    def norm(self, parent: nn.Module, name: str, width: int) -> tuple[Matrix, float]:
        """Weight and epsilon of an `RMSNorm`."""
        module = self.module(parent, name, RMSNorm)
        return self.tensor(module, "weight", width), self.constant(module, "eps")

    def constant(self, module: nn.Module, name: str) -> Any:
        """An attribute that must stay the object that it is."""
        value = module.__dict__[name]
        self._slots.append((module.__dict__, name, value))
        return value

    def current(self) -> bool:
        """Whether all of it is still in place and nobody listens with a hook."""
        for holder, name, held in self._slots:
            if holder.get(name) is not held:
                return False
        for tensor, address, shape in self._tensors:
            if tensor.data_ptr() != address or tensor.shape != shape or tensor.dtype != torch.float32:
                return False
            if not tensor.is_contiguous():
                return False
        for module, kind in self._modules:
            if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
                return False
        return True
