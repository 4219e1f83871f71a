"""Which optimiser owns which parameter, and how Muon cuts it.

GLM-5 report, appendix A: Muon for everything but embeddings, biases and norms; those go to AdamW. The output head
counts as an embedding. Weight decay touches matrices only: neither embeddings, nor biases, nor norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from glm5.config import ModelConfig
from glm5.errors import ConfigError
from glm5.optim.muon import Muon, Split, experts, heads, whole


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyper-parameters of one stage; the rate is the peak of the schedule, shared by both optimisers."""

    name: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon for the matrices, AdamW for the rest. `adamw`: AdamW for everything."""
    split: bool = True
    """Muon takes heads, and the gate and up of an expert, apart; without, it takes each weight as one matrix."""
    lr: float = 2e-4
    """The peak of the learning rate."""
    momentum: float = 0.95
    """Of Muon."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of AdamW's second average."""
    weight_decay: float = 0.1
    """Times the rate, the part of a weight that each step takes away."""
    embedding_lr_scale: float = 1.0
    """Factor on `lr` for embeddings, biases and norms."""

    def __post_init__(self) -> None:
        if self.name not in ("muon", "adamw"):
            raise ConfigError(f"optimizer is {self.name!r}; use 'muon' or 'adamw'.")
        for name in ("lr", "eps", "embedding_lr_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a finite number above 0.")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay is {self.weight_decay}; it must be a finite number of at least 0.")
        if len(self.betas) != 2 or not all(0 <= average < 1 for average in (self.momentum, *self.betas)):
            raise ConfigError(
                f"momentum is {self.momentum} and betas are {self.betas}; momentum and both betas must be at least 0 "
                "and below 1."
            )


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """True for the weights of linear maps inside the layers: what Muon may orthogonalise."""
    return parameter.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name


def split_of(name: str, config: ModelConfig, *, split: bool = True) -> Split:
    """How Muon cuts the matrix called `name` (a dotted parameter name of `GLM5`); plain Muon when `split` is False."""
    owner = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if ".experts." in name:
        return experts(2 if owner == "gate_up_proj" and split else 1)
    if owner == "q_b_proj" and split:  # W^UQ
        return heads(config.qk_head_dim)
    if owner == "kv_b_proj" and split:  # W^UK on top of W^UV in every head
        return heads(config.qk_nope_head_dim, config.v_head_dim)
    return whole


def build_optimizers(
    model: nn.Module,
    model_config: ModelConfig,
    config: OptimizerConfig,
    *,
    only: Callable[[str], bool] = lambda name: True,
) -> list[torch.optim.Optimizer]:
    """The optimisers of all parameters of `model` that require a gradient; each is stepped once per step.

    only: whether the parameter of that name belongs to these optimisers; for parts with rates of their own.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad and only(name)]
    if not trainable:
        raise ConfigError("nothing is left to train: every parameter of the model is frozen.")
    matrices = [(name, p) for name, p in trainable if is_matrix(name, p)]
    others = [p for name, p in trainable if not is_matrix(name, p)]
    plain_groups: list[dict[str, Any]] = []
    if others:
        plain_groups.append({"params": others, "weight_decay": 0.0, "lr": config.lr * config.embedding_lr_scale})
    optimizers: list[torch.optim.Optimizer] = []
    if config.name == "muon" and matrices:
        pairs = [(p, split_of(name, model_config, split=config.split)) for name, p in matrices]
        optimizers.append(Muon(pairs, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay))
    elif matrices:
        plain_groups.append({"params": [p for _, p in matrices], "weight_decay": config.weight_decay, "lr": config.lr})
    if plain_groups:
        plain_groups = [part for group in plain_groups for part in _by_mesh(group)]
        optimizers.append(torch.optim.AdamW(plain_groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group as groups whose parameters are cut over the same processes: the fused AdamW takes no mixture."""
    meshes: dict[object, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        meshes.setdefault(mesh, []).append(parameter)
    return [{**group, "params": parameters} for parameters in meshes.values()]


def set_rate(optimizers: list[torch.optim.Optimizer], fraction: float) -> None:
    """Sets every learning rate to `fraction` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction
