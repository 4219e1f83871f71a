"""The cache of a model: one latent row per token and layer, one indexer key per token and full-indexer layer.

`Cache` is the small protocol that a forward pass speaks; the contiguous `LatentCache` implements it here, a paged one
can elsewhere. Latents and indexer keys of all its layers are grown, cut and forked together: a cache that restored one
without the other would give silently wrong text above `index_topk` tokens. The MTP modules lag behind the trunk by a
token, so their rows are a cache of their own (`draft_layers`), cut and forked beside the trunk's by their user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.errors import InputError
from glm5.ops import selection
from glm5.ops.spans import Spans, plain_spans, segment_spans

Attend = Callable[[int, Tensor, Tensor | None, int, float], Tensor]


class Cache(Protocol):
    """What a forward pass needs from a cache. The rows that it writes count only after `commit`."""

    length: int
    """Tokens written."""

    @property
    def attend(self) -> Attend | None:
        """Absorbed attention over the chosen rows where they lie, for a cache that knows better than `read`; else None.

        `attend(layer, q_BTHC, selected_BTK, value_width, scale)` gives [B, T, H, value_width].
        """

    def reserve(self, batch: int, tokens: int, segments_BT: Tensor | None, positions_BT: Tensor | None) -> Spans:
        """Makes room for `tokens` more rows and says what each new query may see."""

    def append_latents(self, layer: int, latents_BTC: Tensor) -> None:
        """Stores the new rows of a layer."""

    def append_keys(self, layer: int, keys_BTI: Tensor) -> None:
        """Stores the new indexer keys of a layer."""

    def keys_of(self, layer: int) -> Tensor:
        """All indexer keys of a layer, in order of position [B, S, I]."""

    def select(self, layer: int, q_BTHI: Tensor, w_BTH: Tensor, spans: Spans, k: int) -> Tensor | None:
        """The indexer's k best keys of every query [B, T, K], -1 padded; None: all that is visible.

        What the numbers mean is between `select` and `read`.
        """

    def read(self, layer: int, selected_BTK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Latents [B, S, C] of a layer, the new ones included, and which of them every query attends to.

        selected_BTK: what `select` chose in this layer or in the one whose indexer it shares; -1 pads what comes back.
        None on both sides means all that is visible.
        """

    def commit(self) -> None:
        """Counts the reserved rows as written."""

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on."""


def draft_layers(config: ModelConfig) -> range:
    """The layers of the MTP modules, for a `LatentCache` that `GLM5.draft` fills."""
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


class LatentCache:
    """Preallocated contiguous rows, layer -> [B, capacity, width]."""

    attend = None

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layers: Sequence[int] | None = None,
    ) -> None:
        """Room for `capacity` tokens in each of `batch` rows; for the trunk's layers unless `layers` names others."""
        self.limit = config.max_position_embeddings
        self._refuse_beyond_limit(capacity)
        place: dict[str, Any] = {"dtype": dtype, "device": torch.device(device)}
        width = config.kv_lora_rank + config.qk_rope_head_dim
        types = config.indexer_types + ("full",) * config.num_nextn_predict_layers
        layers = range(config.num_hidden_layers) if layers is None else layers
        self.latents = {layer: torch.empty(batch, capacity, width, **place) for layer in layers}
        self.keys = {
            layer: torch.empty(batch, capacity, config.index_head_dim, **place)
            for layer in layers
            if types[layer] == "full"
        }
        self.batch, self.capacity, self.length = batch, capacity, 0
        self.segments_BS: Tensor | None = None
        self._reserved = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, all layers together."""
        tensors = [*self.latents.values(), *self.keys.values()]
        return sum(t.shape[-1] * t.element_size() for t in tensors)

    def claim(self, batch: int, tokens: int) -> None:
        """Makes sure that `tokens` more of each of `batch` rows fit; `commit` then counts them."""
        if batch != self.batch:
            raise InputError(f"The cache holds {self.batch} row(s) but the input has {batch}; make a cache that fits.")
        if self.length + tokens > self.capacity:
            raise InputError(
                f"The cache is full: {self.length:,} of {self.capacity:,} tokens are taken and {tokens:,} more were "
                "given; make a larger cache, or grow this one."
            )
        if self.length == 0:
            self.segments_BS = None  # of what was forgotten
        self._reserved = tokens

    def reserve(self, batch: int, tokens: int, segments_BT: Tensor | None, positions_BT: Tensor | None) -> Spans:
        """See `Cache`. Without segment ids the new tokens continue each row's last segment."""
        self.claim(batch, tokens)
        device = next(iter(self.latents.values())).device
        if segments_BT is None and self.segments_BS is None:
            return plain_spans(batch, tokens, self.length, positions_BT, device)
        if self.segments_BS is None:
            self.segments_BS = torch.zeros(batch, self.capacity, dtype=torch.int64, device=device)
        if segments_BT is None:
            segments_BT = self.segments_BS[:, self.length - 1 : self.length].expand(batch, tokens)
        end = self.length + tokens
        self.segments_BS[:, self.length : end] = segments_BT
        return segment_spans(self.segments_BS[:, :end], tokens, positions_BT)

    def append_latents(self, layer: int, latents_BTC: Tensor) -> None:
        """See `Cache`."""
        self._append(self.latents, layer, latents_BTC)

    def append_keys(self, layer: int, keys_BTI: Tensor) -> None:
        """See `Cache`."""
        self._append(self.keys, layer, keys_BTI)

    def keys_of(self, layer: int) -> Tensor:
        """See `Cache`."""
        return self.keys[layer][:, : self.length + self._reserved]

    def select(self, layer: int, q_BTHI: Tensor, w_BTH: Tensor, spans: Spans, k: int) -> Tensor | None:
        """See `Cache`; positions."""
        return selection.choose(q_BTHI, self.keys_of(layer), w_BTH, spans, k)

    def read(self, layer: int, selected_BTK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Cache`."""
        return self.latents[layer][:, : self.length + self._reserved], selected_BTK

    def _append(self, rows: dict[int, Tensor], layer: int, new_BTC: Tensor) -> None:
        if layer not in rows:
            raise InputError(
                f"The cache has no rows for layer {layer}; the trunk and the MTP modules (layers=draft_layers(config)) "
                "need a cache each."
            )
        rows_BSC = rows[layer]
        if rows_BSC.dtype != new_BTC.dtype:
            raise InputError(
                f"The cache holds {rows_BSC.dtype} but the model computes in {new_BTC.dtype}; make the cache with "
                f"dtype={new_BTC.dtype}."
            )
        rows_BSC[:, self.length : self.length + self._reserved] = new_BTC

    def commit(self) -> None:
        """See `Cache`."""
        self.length += self._reserved
        self._reserved = 0

    def truncate(self, length: int) -> None:
        """See `Cache`."""
        if not 0 <= length <= self.length:
            raise InputError(f"Cannot cut a cache of {self.length:,} tokens to {length:,}; give a shorter length.")
        self.length = length

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens a row; the written rows stay. A smaller number changes nothing."""
        self._refuse_beyond_limit(capacity)
        if capacity > self.capacity:
            self.capacity = capacity
            self._copy_rows()

    def fork(self) -> LatentCache:
        """An independent copy of the written rows, with the same capacity."""
        copy = object.__new__(LatentCache)
        copy.__dict__.update(self.__dict__, latents=dict(self.latents), keys=dict(self.keys), _reserved=0)
        copy._copy_rows()
        return copy

    def _copy_rows(self) -> None:
        """Moves the written rows into new memory of the present capacity."""

        def copied(old: Tensor) -> Tensor:
            new = old.new_zeros(old.shape[0], self.capacity, *old.shape[2:])
            new[:, : self.length] = old[:, : self.length]
            return new

        self.latents = {layer: copied(rows) for layer, rows in self.latents.items()}
        self.keys = {layer: copied(rows) for layer, rows in self.keys.items()}
        self.segments_BS = None if self.segments_BS is None else copied(self.segments_BS)

    def _refuse_beyond_limit(self, capacity: int) -> None:
        if capacity > self.limit:
            raise InputError(
                f"A cache of {capacity:,} tokens exceeds the model's {self.limit:,} positions; "
                "ask for a shorter context."
            )
