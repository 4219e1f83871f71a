"""Decoding of small fp32 models on a CPU: a few tokens at once, without the cost of starting operators.

`Decoder` is the forward pass of `transformer.py` for some new tokens, each with its own position and sequence, over a
contiguous or a paged cache (`slots.py`), with the layers of `layer_steps.py`, written as calls of `ops/decoding.py`;
and a draft step of the first MTP module in the same way. Every token is computed by the same instructions whatever
stands beside it: that is what the engine's strict mode builds on, for prompts as for decoding. The modules stay the
truth: tests compare the two over every part, and whatever is not known here (adapters, hooks, other dtypes, grouped
routers, replaced modules, packed rows) is left to them.

Nothing is derived from the weights. The decoder keeps where they lie, reads them there, and checks before every step
that the model still consists of the same modules and memory. Weights that train or are loaded are seen at once.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.model.layer import DecoderLayer
from glm5.model.layer_steps import AttentionStep, DraftStep, FeedForwardStep, Rows, Seen
from glm5.model.slots import Slots
from glm5.model.weights_in_place import Unsuitable, WeightsInPlace
from glm5.ops import decoding as do
from glm5.ops.decoding import Matrix
from glm5.ops.rotary import Rotation, rotation

TABLE = 64
"""Positions whose rotary tables are computed together."""
MOST_TABLES = 4096
"""Tables that are kept: of 262,144 positions."""


class Pools(Protocol):
    """A cache, as far as a decoder asks what it holds."""

    @property
    def latents(self) -> Mapping[int, Any]:
        """By layer."""

    @property
    def keys(self) -> Mapping[int, Any]:
        """By full-indexer layer."""


class Decoder:
    """The steps of one model. Several threads may call it; they take turns."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        """Raises Unsuitable."""
        if config.n_group != 1 or not do.available():
            raise Unsuitable
        c = self.config = config
        self._weights = weights = WeightsInPlace()
        self._full_layers = {i for i, kind in enumerate(c.indexer_types) if kind == "full"}
        self._lm_head = weights.linear(model, "lm_head", c.vocab_size, c.hidden_size)
        trunk = weights.module(model, "model", type(model.get_submodule("model")))  # it has no forward of its own
        self._embedding = weights.tensor(
            weights.module(trunk, "embed_tokens", nn.Embedding), "weight", c.vocab_size, c.hidden_size
        )
        self._norm = weights.norm(trunk, "norm", c.hidden_size)
        layers = self._layers = weights.module(trunk, "layers", nn.ModuleList)
        if len(layers) != c.num_hidden_layers:
            raise Unsuitable
        self._steps: list[AttentionStep | FeedForwardStep] = []
        for i, (mlp_type, indexer_type) in enumerate(zip(c.mlp_layer_types, c.indexer_types, strict=True)):
            layer = weights.module(layers, str(i), DecoderLayer)
            self._steps.append(AttentionStep(weights, layer, c, indexer_type))
            self._steps.append(FeedForwardStep(weights, layer, c, mlp_type))
        if not weights.current():  # hooks, a replaced forward
            raise Unsuitable
        self._draft_weights = WeightsInPlace()
        self._draft: DraftStep | None = None
        try:
            self._draft = DraftStep(self._draft_weights, model, config)
        except Unsuitable:
            pass  # no such module, or one that only its own code knows how to run
        self._rows: dict[int, Rows] = {}
        self._angles: dict[int, dict[bool, tuple[Matrix, Matrix]]] = {}
        self._angles_alive: list[Rotation] = []
        self._turn = threading.Lock()

    @property
    def products(self) -> int:
        """Multiplications of a token without those of attention and selection."""
        return self._weights.products

    def current(self, config: ModelConfig) -> bool:
        """Whether the model still consists of what this decoder reads."""
        return self.config is config and 2 * len(self._layers) == len(self._steps) and self._weights.current()

    def fits(self, cache: Pools) -> bool:
        """Whether the cache holds rows of every layer."""
        return cache.latents.keys() >= set(range(len(self._layers))) and cache.keys.keys() >= self._full_layers

    def step(
        self,
        ids: list[int],
        slots: Slots,
        sparse: bool,
        keep: Sequence[int] | None = None,
        experts_LNK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [K, V] of the new tokens `keep` (by default of all) and final states of all [N, D].

        The pools hold the new tokens afterwards. A state is what the MTP modules go on from. experts_LNK: int64, takes
        the experts that each sparse layer chooses.
        """
        with self._turn:
            rows, seen = self._start(ids, slots, sparse)
            for step in self._steps:
                step(rows, seen)
            do.rms_norm(rows.x, rows.h, *self._norm)
            if experts_LNK is not None:
                experts_LNK.copy_(rows.experts_LNK[: len(experts_LNK)])
            return self._finish(rows, rows.x if self.config.mtp_hidden == "after_norm" else rows.h, keep)

    def can_draft(self, cache: Pools) -> bool:
        """Whether `draft` knows the first MTP module as it is now, and the cache has its rows."""
        draft = self._draft
        if draft is None or draft.layer not in cache.latents or draft.layer not in cache.keys:
            return False
        return self._draft_weights.current()

    def draft(
        self, states_ND: Tensor, next_ids: list[int], slots: Slots, sparse: bool, keep: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`step` for the first MTP module: `GLM5.draft` of some states and the tokens that follow theirs."""
        assert self._draft is not None
        states_ND = states_ND.contiguous()
        with self._turn:
            rows, seen = self._start(next_ids, slots, sparse)
            self._draft(rows, seen, Matrix.of(states_ND))
            return self._finish(rows, rows.x, keep)

    def _start(self, ids: list[int], slots: Slots, sparse: bool) -> tuple[Rows, Seen]:
        """Activations that hold the embeddings of the ids, and what they see."""
        rows = self._rows.get(len(ids))
        if rows is None:
            rows = self._rows[len(ids)] = Rows(self.config, len(ids))
        self._turn_to(rows, slots.positions)
        tokens = array("q", ids)
        do.gather(rows.h, self._embedding, _vector(tokens))
        return rows, Seen(rows, slots, self.config.index_topk, sparse)

    def _finish(self, rows: Rows, states: Matrix, keep: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Logits of the rows to keep, whose normed states lie in x, and a copy of all states."""
        states_ND = torch.empty(rows.batch, self.config.hidden_size)
        do.copy(Matrix.of(states_ND), states)
        kept = array("q", range(rows.batch) if keep is None else keep)
        logits_KV = torch.empty(len(kept), self.config.vocab_size)
        if len(kept):  # h is free now
            normed = rows.h.lines(0, len(kept))
            do.gather(normed, rows.x, _vector(kept))
            do.linear(Matrix.of(logits_KV), normed, self._lm_head, 1.0, False)
        return logits_KV, states_ND

    def _turn_to(self, rows: Rows, positions: list[int]) -> None:
        """cos and sin of the positions per layout, from tables of `TABLE` positions that are kept."""
        for row, position in enumerate(positions):
            start = position // TABLE * TABLE
            if start not in self._angles:
                self._add_angles(start)
            for layout, tables in self._angles[start].items():
                for angles, table in zip(rows.angles[layout], tables, strict=True):
                    do.copy(angles.lines(row, 1), table.lines(position - start, 1))

    def _add_angles(self, start: int) -> None:
        c = self.config
        if len(self._angles) == MOST_TABLES:
            self._angles.clear()
            self._angles_alive.clear()
        self._angles[start] = {}
        positions_1T = torch.arange(start, start + TABLE)[None]
        for layout in {c.rope_interleave, c.indexer_rope_interleave}:
            table = rotation(positions_1T, c.qk_rope_head_dim, c.rope_theta, torch.float32, interleaved=layout)
            self._angles_alive.append(table)
            self._angles[start][layout] = Matrix.of(table.cos_BT1R), Matrix.of(table.sin_BT1R)


def _vector(numbers: array[int]) -> Matrix:
    address, count = numbers.buffer_info()
    return Matrix(address, 1, count, count)
