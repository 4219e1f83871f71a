"""Which steps of a model its decoder takes (`decode.py`), and which are left to the modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from glm5.config import ModelConfig
from glm5.model.cache import Cache, LatentCache
from glm5.model.decode import Decoder
from glm5.model.slots import Slots
from glm5.model.weights_in_place import Unsuitable

FEW_ROWS = 64
"""With more rows PyTorch's operators, whose start the rows share, are faster."""
MOST_PRODUCTS = 1 << 25
"""Multiplications of a token. Beyond, several threads gain more than what starting operators costs."""


class FastSteps:
    """Decode steps of a model by a `Decoder`, where the model and the step suit it."""

    def __init__(self) -> None:
        self._decoder: Decoder | None = None

    def __reduce__(self) -> Any:
        return FastSteps, ()  # a copy of a model finds its own weights

    def logits(
        self, model: nn.Module, config: ModelConfig, ids_BT: Tensor, cache: Cache | None, sparse: bool
    ) -> Tensor | None:
        """Logits [B, 1, V] of a step, whose rows the cache then holds; None: nothing was done, run the modules."""
        if ids_BT.shape[1] != 1 or not isinstance(cache, LatentCache):
            return None
        if type(ids_BT) is not Tensor or not (cache.segments_BS is None or cache.length == 0):
            return None
        decoder = self.decoder(model, config, ids_BT.shape[0])
        first = next(iter(cache.latents.values()))
        if decoder is None or not decoder.fits(cache) or first.dtype != torch.float32 or first.device.type != "cpu":
            return None
        cache.claim(ids_BT.shape[0], 1)
        logits_BV, _ = decoder.step(ids_BT[:, 0].tolist(), Slots.next_of(cache), sparse)
        cache.commit()
        return logits_BV.unsqueeze(1)

    def decoder(self, model: nn.Module, config: ModelConfig, tokens: int) -> Decoder | None:
        """What runs so many tokens of this model faster than the modules; None: the modules do, or nothing else may."""
        decoder = self.exact_decoder(model, config)
        if decoder is None or tokens > FEW_ROWS or (decoder.products > MOST_PRODUCTS and torch.get_num_threads() > 1):
            return None
        return decoder

    def exact_decoder(self, model: nn.Module, config: ModelConfig) -> Decoder | None:
        """The decoder of the model as it is now, whatever its size; None where only the modules know how to run it, or
        where somebody wants gradients, casts or a trace."""
        if self._decoder is not None and not self._decoder.current(config):
            self._decoder = None  # and with it the memory that the model has left
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or has_any_global_hook()
        ):
            return None
        if self._decoder is None:
            try:
                self._decoder = Decoder(model, config)
            except Unsuitable:
                return None
        return self._decoder
