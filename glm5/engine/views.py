"""What a forward pass sees of the paged cache: the model's `Cache` protocol over one sequence, or over many at once.

- `SequenceView`: a run of new tokens of one sequence (prefill). Each layer's rows are copied out of the pool in order
  of position once a pass: every query reads many of them, so one ordered copy in the model's dtype is the cheapest.
- `BatchView`: a few new tokens of each of many sequences (decoding, verification), flattened into one row [1, N]. The
  choice of a query is in physical slots, so attention gathers straight from the pool.

Given `kernels` (`ops/gpu`), both choose keys where they lie in the pool, and `BatchView` attends to latents there.

Left out: segments and padding (sequences of the engine have neither), and the indexer's statistics over a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5.engine.paged_cache import PagedCache
from glm5.engine.pool import Pool
from glm5.errors import InputError
from glm5.ops import attention, selection
from glm5.ops.gpu import Kernels
from glm5.ops.gpu.stored import Places, StoredRows
from glm5.ops.spans import Spans, plain_spans


@dataclass(frozen=True)
class Run:
    """The new tokens of one sequence: how many, after how many, and in which blocks they all lie."""

    tokens: int
    start: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.tokens


class SequenceView:
    """New tokens of one sequence, in one pass or in several that follow each other."""

    attend = None

    def __init__(self, cache: PagedCache, run: Run, kernels: Kernels | None = None) -> None:
        self.cache, self.run, self.kernels, self.length = cache, run, kernels, run.start
        self._slots = cache.slots(run.block_table, 0, run.end)
        self._reserved = 0
        self._places: Places | None = None

    def reserve(self, batch: int, tokens: int, segments_BT: Tensor | None, positions_BT: Tensor | None) -> Spans:
        """See `Cache`."""
        assert batch == 1 and segments_BT is None and self.length + tokens <= len(self._slots)
        self._reserved = tokens
        if self.kernels is not None:
            self._places = _places(self.cache, [Run(tokens, self.length, self.run.block_table)])
        return plain_spans(1, tokens, self.length, positions_BT, self.cache.device)

    def append_latents(self, layer: int, latents_BTC: Tensor) -> None:
        """See `Cache`."""
        self.cache.latents[layer].write(self._slots[self.length : self._end], latents_BTC[0])

    def append_keys(self, layer: int, keys_BTI: Tensor) -> None:
        """See `Cache`."""
        self.cache.keys[layer].write(self._slots[self.length : self._end], keys_BTI[0])

    def keys_of(self, layer: int) -> Tensor:
        """See `Cache`."""
        return self._all(self.cache.keys[layer])

    def select(self, layer: int, q_BTHI: Tensor, w_BTH: Tensor, spans: Spans, k: int) -> Tensor | None:
        """See `Cache`; positions."""
        if self._end <= k:
            return None
        if self.kernels is None or self._places is None:
            return selection.select(q_BTHI, self.keys_of(layer), w_BTH, spans, k)
        return self.kernels.select(q_BTHI[0], w_BTH[0], _stored(self.cache.keys[layer]), self._places, k).unsqueeze(0)

    def read(self, layer: int, selected_BTK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Cache`."""
        return self._all(self.cache.latents[layer]), selected_BTK

    def commit(self) -> None:
        """See `Cache`."""
        self.length, self._reserved = self._end, 0

    def truncate(self, length: int) -> None:
        """See `Cache`."""
        self.length = length

    @property
    def _end(self) -> int:
        return self.length + self._reserved

    def _all(self, pool: Pool) -> Tensor:
        return pool.read(self._slots[: self._end], self.cache.dtype).unsqueeze(0)


class BatchView:
    """A few new tokens of each of many sequences, one after another in one row of a pass."""

    length = 0

    def __init__(self, cache: PagedCache, runs: Sequence[Run], kernels: Kernels | None = None) -> None:
        self.cache, self.runs, self.kernels = cache, runs, kernels
        self._slots = [cache.slots(run.block_table, 0, run.end) for run in runs]
        positions_N = torch.cat([torch.arange(run.start, run.end, device=cache.device) for run in runs])
        self.positions_1N = positions_N.unsqueeze(0)
        self._new_N = torch.cat([slots[run.start :] for slots, run in zip(self._slots, runs, strict=True)])
        self._everything: Tensor | None = None
        self._places = None if kernels is None else _places(cache, runs)

    def reserve(self, batch: int, tokens: int, segments_BT: Tensor | None, positions_BT: Tensor | None) -> Spans:
        """See `Cache`. The intervals are of each query's own sequence."""
        assert (batch, tokens) == self.positions_1N.shape and segments_BT is None
        lo_1N = torch.zeros_like(self.positions_1N)
        return Spans(lo_1N, self.positions_1N + 1, self.positions_1N, single=False, start=0)

    def append_latents(self, layer: int, latents_BTC: Tensor) -> None:
        """See `Cache`."""
        self.cache.latents[layer].write(self._new_N, latents_BTC[0])

    def append_keys(self, layer: int, keys_BTI: Tensor) -> None:
        """See `Cache`."""
        self.cache.keys[layer].write(self._new_N, keys_BTI[0])

    def keys_of(self, layer: int) -> Tensor:
        """Sequences have no common order."""
        raise InputError("The indexer's statistics are of one sequence; collect them without a batch of sequences.")

    def select(self, layer: int, q_BTHI: Tensor, w_BTH: Tensor, spans: Spans, k: int) -> Tensor | None:
        """See `Cache`; physical slots."""
        if max(run.end for run in self.runs) <= k:
            return None
        if self.kernels is not None and self._places is not None:
            keys = _stored(self.cache.keys[layer])
            at_NK = self.kernels.select(q_BTHI[0], w_BTH[0], keys, self._places, k)
            return self._places.slots(at_NK).unsqueeze(0)
        chosen_TK, first = [], 0
        for run, slots_S in zip(self.runs, self._slots, strict=True):
            part = slice(first, first + run.tokens)
            own = Spans(spans.lo_BT[:, part], spans.hi_BT[:, part], spans.positions_BT[:, part], True, run.start)
            if run.end > k:
                keys_BSI = self.cache.keys[layer].read(slots_S, self.cache.dtype).unsqueeze(0)
                at_TK = selection.select(q_BTHI[:, part], keys_BSI, w_BTH[:, part], own, k)[0]
            else:
                at_TK = selection.everything(own, k)[0]
            chosen_TK.append(_slots_of(at_TK, slots_S))
            first = part.stop
        return torch.cat(chosen_TK).unsqueeze(0)

    def read(self, layer: int, selected_BTK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Cache`."""
        pool = self.cache.latents[layer]
        selected_1NK = self._all_slots() if selected_BTK is None else selected_BTK
        if pool.rows_XW.dtype == self.cache.dtype:
            return pool.rows_XW.unsqueeze(0), selected_1NK
        # Another format: what is chosen is copied out. Padding stands for the query's first choice, and stays padding.
        own_1NK = torch.where(selected_1NK < 0, selected_1NK[..., :1], selected_1NK)
        latents_1XC = pool.read(own_1NK.flatten(), self.cache.dtype).unsqueeze(0)
        places_1NK = torch.arange(own_1NK.numel(), device=own_1NK.device).view_as(own_1NK)
        return latents_1XC, places_1NK.masked_fill_(selected_1NK < 0, -1)

    def attend(self, layer: int, q_BTHC: Tensor, selected_BTK: Tensor | None, value_width: int, scale: float) -> Tensor:
        """See `Cache`. What is read of the pool is what was chosen, also where everything is."""
        if self.kernels is None:
            latents_1XC, places_1NK = self.read(layer, selected_BTK)
            assert places_1NK is not None
            return attention.sparse_attention(q_BTHC, latents_1XC, places_1NK, value_width, scale)
        selected_1NK = self._all_slots() if selected_BTK is None else selected_BTK
        latents = _stored(self.cache.latents[layer])
        return self.kernels.attend(q_BTHC[0], latents, selected_1NK[0], value_width, scale).unsqueeze(0)

    def commit(self) -> None:
        """See `Cache`: there is nothing to count."""

    def truncate(self, length: int) -> None:
        """See `Cache`: there is nothing to forget."""

    def _all_slots(self) -> Tensor:
        """Every slot that each query sees [1, N, K], -1 padded."""
        if self._everything is None:
            longest = max(run.end for run in self.runs)
            at_XK = [
                F.pad(slots_S, (0, longest - len(slots_S)), value=-1).expand(run.tokens, -1)
                for run, slots_S in zip(self.runs, self._slots, strict=True)
            ]
            hidden = torch.arange(longest, device=self.cache.device) > self.positions_1N[0, :, None]
            self._everything = torch.cat(at_XK).masked_fill(hidden, -1).unsqueeze(0)
        return self._everything


def _stored(pool: Pool) -> StoredRows:
    return StoredRows(pool.rows_XW, pool.scales_XG)


def _places(cache: PagedCache, runs: Sequence[Run]) -> Places:
    """Where the kernels find what each new token of some sequences sees."""
    blocks = max(len(run.block_table) for run in runs)
    tables = [[*run.block_table, *[0] * (blocks - len(run.block_table))] for run in runs]
    new = [(i, position + 1) for i, run in enumerate(runs) for position in range(run.start, run.end)]
    sequence_N, hi_N = torch.tensor(new, device=cache.device).T.contiguous()
    tables_RB = torch.tensor(tables, device=cache.device)
    longest = max(run.end for run in runs)
    return Places(tables_RB, cache.block_size, sequence_N, torch.zeros_like(hi_N), hi_N, longest)


def _slots_of(at_TK: Tensor, slots_S: Tensor) -> Tensor:
    return slots_S[at_TK.clamp_min(0)].masked_fill_(at_TK < 0, -1)
