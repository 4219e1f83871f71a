"""LoRA in RL: a few trained matrices on a frozen base, which may be quantised; what of it goes to the engines.

The adapters are the unit of weight sync: `adapter_tensors` is a small part of the model. An engine takes them in one of
two ways. Either its model has the same adapters (a copy of the learner's), and `Engine.update_weights` takes the
adapter tensors alone, which runs on the general modules; or a whole model is sent (`merged_weights`), which any engine
runs at full speed, also one far away that has never heard of adapters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glm5.errors import ConfigError
from glm5.model import GLM5, add_adapters
from glm5.model.int4 import quantize_base, unpack_base
from glm5.model.lora import DEFAULT_TARGETS
from glm5.ops.experts import Experts
from glm5.ops.linear import Linear
from glm5.train.checks import check_choice, check_counts, check_numbers


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which adapters, on what."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    seed: int = 0
    """Of the first values of A; B begins at zero."""
    base: Literal["full", "int4"] = "full"
    """How the frozen weights are kept. The engines must sample from the same, rounded, weights."""
    sync: Literal["adapters", "merged"] = "adapters"
    """What the engines take: the adapters' tensors, or a whole model each time."""

    def __post_init__(self) -> None:
        check_counts(self, "rank")
        check_counts(self, "seed", least=0)
        check_numbers(self, "alpha", above=0)
        check_choice(self, "base", "full", "int4")
        check_choice(self, "sync", "adapters", "merged")


def adapt(model: GLM5, config: LoRA) -> list[str]:
    """Freezes the model, adds the adapters and packs the base; gives the names of the adapted modules.

    Raises ConfigError where no policy loss reaches an adapter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        names = add_adapters(model, rank=config.rank, alpha=config.alpha, targets=config.targets)
    if all(name.startswith("mtp.") or ".indexer." in name for name in names):
        raise ConfigError(
            f"Nothing would learn: {', '.join(config.targets)} names MTP modules and indexers alone, which a LoRA run "
            "leaves as they are; name linear or expert weights of the layers, such as *.o_proj."
        )
    if config.base == "int4":
        quantize_base(model)
    return names


def check_targets(model: nn.Module, config: LoRA) -> None:
    """Raises ConfigError for a pattern that names nothing of the model, which may be on the meta device."""
    names = [name for name, module in model.named_modules() if isinstance(module, Linear | Experts)]
    for pattern in config.targets:
        if not any(fnmatch(name, pattern) for name in names):
            raise ConfigError(
                f"lora.targets: no linear or expert weight is called {pattern!r}; one is {names[len(names) // 2]!r}."
            )


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own tensors, under their names in the model's state."""
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of a plain model that computes the same: adapters added in, packed weights made whole."""
    found: dict[str, Tensor] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            found[f"{name}.weight"] = module.effective_weight().detach()
        elif isinstance(module, Experts):
            gate_up, down = module.effective_weights()
            found |= {f"{name}.gate_up_proj": gate_up.detach(), f"{name}.down_proj": down.detach()}
        else:
            continue
        inside.append(f"{name}.")
    others = {n: t for n, t in model.state_dict().items() if not n.startswith(tuple(inside))}
    return {**others, **found}


def merged_model(model: GLM5) -> GLM5:
    """A plain model of its own memory that computes the same."""
    weights = merged_weights(model)
    plain = GLM5(model.config, dtype=model.lm_head.weight.dtype, device=model.lm_head.weight.device)
    plain.load_state_dict(weights)
    return plain.train(model.training)


def engine_model(model: GLM5, config: LoRA) -> GLM5:
    """What an engine begins with that is to take the adapters, or whole models, of the learner's `model`.

    Over an INT4 base it has the rounded weights whole: an engine that made them whole at each token would stand still.
    """
    if config.sync == "merged":
        return merged_model(model)
    if config.base == "int4":
        model = copy.deepcopy(model)
        unpack_base(model)
    return model


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: the reference policy of a LoRA run, at no cost in memory."""
    kept: list[tuple[Any, str, nn.Module]] = [
        (module, slot, adapter)
        for module in model.modules()
        for slot in ("adapter", "gate_up_adapter", "down_adapter")
        if isinstance(adapter := getattr(module, slot, None), nn.Module)
    ]
    try:
        for module, slot, _ in kept:
            setattr(module, slot, None)
        yield
    finally:
        for module, slot, adapter in kept:
            setattr(module, slot, adapter)
