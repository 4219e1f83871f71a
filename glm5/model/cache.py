"""The cache of a model: one latent row per token and layer, one indexer key per token and full-indexer layer.

`Cache` is the small protocol that attention speaks; the contiguous `LatentCache` implements it here, a paged one can
elsewhere. Latents, indexer keys and the rows of the MTP modules are grown, cut and forked together: a cache that
restored one without the other would give silently wrong text above `index_topk` tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.errors import InputError
from glm5.ops.spans import Spans, plain_spans, segment_spans


class Cache(Protocol):
    """What a forward pass needs from a cache. The rows that it writes count only after `commit`."""

    length: int
    """Tokens written."""

    def reserve(self, batch: int, tokens: int, segments_BT: Tensor | None, positions_BT: Tensor | None) -> Spans:
        """Makes room for `tokens` more rows and says what each new query may see."""

    def append_latents(self, layer: int, latents_BTC: Tensor) -> Tensor:
        """Stores the new rows of a layer; gives all its rows [B, S, C]."""

    def append_keys(self, layer: int, keys_BTI: Tensor) -> Tensor:
        """Stores the new indexer keys of a layer; gives all its keys [B, S, I]."""

    def commit(self) -> None:
        """Counts the reserved rows as written."""

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on."""


class LatentCache:
    """Preallocated contiguous rows, `[layer][B, capacity, width]`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Room for `capacity` tokens in each of `batch` rows, for the trunk and the MTP modules."""
        if capacity > config.max_position_embeddings:
            raise InputError(
                f"A cache of {capacity:,} tokens exceeds the model's {config.max_position_embeddings:,} positions; "
                "ask for a shorter context."
            )
        place: dict[str, Any] = {"dtype": dtype, "device": torch.device(device)}
        width = config.kv_lora_rank + config.qk_rope_head_dim
        types = config.indexer_types + ("full",) * config.num_nextn_predict_layers
        self.latents = [torch.empty(batch, capacity, width, **place) for _ in types]
        self.keys = {
            layer: torch.empty(batch, capacity, config.index_head_dim, **place)
            for layer, kind in enumerate(types)
            if kind == "full"
        }
        self.batch, self.capacity, self.length = batch, capacity, 0
        self.segments_BS: Tensor | None = None
        self._reserved = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, all layers together."""
        tensors = [*self.latents, *self.keys.values()]
        return sum(t.shape[-1] * t.element_size() for t in tensors)

    def reserve(self, batch: int, tokens: int, segments_BT: Tensor | None, positions_BT: Tensor | None) -> Spans:
        """See `Cache`. Without segment ids the new tokens continue each row's last segment."""
        if batch != self.batch:
            raise InputError(f"The cache holds {self.batch} row(s) but the input has {batch}; make a cache that fits.")
        if self.length + tokens > self.capacity:
            raise InputError(
                f"The cache is full: {self.length:,} of {self.capacity:,} tokens are taken and {tokens:,} more were "
                "given; make a larger cache."
            )
        self._reserved = tokens
        device = self.latents[0].device
        if segments_BT is None and self.segments_BS is None:
            return plain_spans(batch, tokens, self.length, positions_BT, device)
        if self.segments_BS is None:
            self.segments_BS = torch.zeros(batch, self.capacity, dtype=torch.int64, device=device)
        if segments_BT is None:
            segments_BT = self.segments_BS[:, self.length - 1 : self.length].expand(batch, tokens)
        end = self.length + tokens
        self.segments_BS[:, self.length : end] = segments_BT
        return segment_spans(self.segments_BS[:, :end], tokens, positions_BT)

    def append_latents(self, layer: int, latents_BTC: Tensor) -> Tensor:
        """See `Cache`."""
        return self._append(self.latents[layer], latents_BTC)

    def append_keys(self, layer: int, keys_BTI: Tensor) -> Tensor:
        """See `Cache`."""
        return self._append(self.keys[layer], keys_BTI)

    def _append(self, rows_BSC: Tensor, new_BTC: Tensor) -> Tensor:
        end = self.length + self._reserved
        rows_BSC[:, self.length : end] = new_BTC
        return rows_BSC[:, :end]

    def commit(self) -> None:
        """See `Cache`."""
        self.length += self._reserved
        self._reserved = 0

    def truncate(self, length: int) -> None:
        """See `Cache`."""
        if not 0 <= length <= self.length:
            raise InputError(f"Cannot cut a cache of {self.length:,} tokens to {length:,}; give a shorter length.")
        self.length = length

    def fork(self) -> LatentCache:
        """An independent copy of the written rows, with the same capacity."""
        copy = object.__new__(LatentCache)
        copy.batch, copy.capacity, copy.length, copy._reserved = self.batch, self.capacity, self.length, 0
        copy.latents = [self._copied(rows) for rows in self.latents]
        copy.keys = {layer: self._copied(rows) for layer, rows in self.keys.items()}
        copy.segments_BS = None if self.segments_BS is None else self.segments_BS.clone()
        return copy

    def _copied(self, rows_BSC: Tensor) -> Tensor:
        copy = torch.empty_like(rows_BSC)
        copy[:, : self.length] = rows_BSC[:, : self.length]
        return copy
