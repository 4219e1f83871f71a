"""Decoding of small fp32 models on a CPU: a few tokens at once, without the cost of starting operators.

`Decoder` is the forward pass of `transformer.py`, `layer.py`, `mla.py` (absorbed form), `indexer.py` and `moe.py` for
some new tokens, each with its own position and sequence, over a contiguous or a paged cache (`slots.py`), written as
calls of `ops/decoding.py`. Every token is computed by the same instructions whatever stands beside it: that is what
the engine's strict mode builds on, for prompts as for decoding. The modules stay the truth: tests compare the two over
every part, and whatever this file does not know (adapters, hooks, other dtypes, grouped routers, replaced modules,
packed rows) is left to them.

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
from glm5.model.indexer import Indexer
from glm5.model.layer import DecoderLayer
from glm5.model.mla import MLA
from glm5.model.moe import MLP, MoE, Router
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


class Rows:
    """The activations of `batch` tokens, reused by every layer and step."""

    def __init__(self, config: ModelConfig, batch: int) -> None:
        c = config
        self.batch = batch
        self._owned: list[Tensor] = []
        heads, latent = c.num_attention_heads, c.kv_lora_rank
        self.h, self.x = self._new(c.hidden_size), self._new(c.hidden_size)
        self.c_q, self.q = self._new(c.q_lora_rank), self._new(heads * c.qk_head_dim)
        self.q_plain = self.q.split(heads).cut(0, c.qk_nope_head_dim)
        self.q_rotary = self.q.split(heads).cut(c.qk_nope_head_dim, c.qk_rope_head_dim)
        kv = self.kv = self._new(latent + c.qk_rope_head_dim)
        self.kv_plain, self.kv_rotary = kv.cut(0, latent), kv.cut(latent, c.qk_rope_head_dim)
        self.absorbed = absorbed = self._new(heads * (latent + c.qk_rope_head_dim)).split(heads)
        self.absorbed_plain, self.absorbed_rotary = absorbed.cut(0, latent), absorbed.cut(latent, c.qk_rope_head_dim)
        self.o_latent = self._new(heads * latent).split(heads)
        self.o = self._new(heads * c.v_head_dim)
        self.o_heads = self.o.split(heads)
        self.index_q = self._new(c.index_n_heads * c.index_head_dim)
        self.index_q_heads = self.index_q.split(c.index_n_heads)
        self.index_q_rotary = self.index_q_heads.cut(0, c.qk_rope_head_dim)
        self.index_k, self.index_w = self._new(c.index_head_dim), self._new(c.index_n_heads)
        self.index_k_rotary = self.index_k.cut(0, c.qk_rope_head_dim)
        self.selected = self._new(c.index_topk, torch.int64)
        self.scores = self._new(c.n_routed_experts)
        self.chosen, self.weights = self._new(c.num_experts_per_tok, torch.int64), self._new(c.num_experts_per_tok)
        self.expert = self._new(2 * c.moe_intermediate_size).lines(0, 1)
        inner = c.moe_intermediate_size * c.n_shared_experts
        self.shared = self._new(inner), self._new(inner)
        self.dense = self._new(c.intermediate_size), self._new(c.intermediate_size)
        self.angles = {
            layout: (self._new(c.qk_rope_head_dim), self._new(c.qk_rope_head_dim))
            for layout in {c.rope_interleave, c.indexer_rope_interleave}
        }

    def _new(self, width: int, dtype: torch.dtype = torch.float32) -> Matrix:
        self._owned.append(torch.empty(self.batch, width, dtype=dtype))
        return Matrix.of(self._owned[-1])


class Seen:
    """What the rows of a step attend to, which a full-indexer layer chooses and the layers that share it reuse."""

    def __init__(self, rows: Rows, slots: Slots, index_topk: int, sparse: bool) -> None:
        self.slots = slots
        self.choosing = sparse and slots.longest > index_topk
        """Whether some row leaves something out."""
        self.places = rows.selected
        """Slots [N, K], -1 padded."""
        if not self.choosing:
            if not sparse:
                self._everything = torch.empty(rows.batch, slots.longest, dtype=torch.int64)
                self.places = Matrix.of(self._everything)
            do.select(self.places, None, None, slots.keys(0), slots.sequences)


class AttentionStep:
    """`MLA.forward` in the absorbed form, with the norm before it and the residual sum after it."""

    def __init__(self, weights: WeightsInPlace, layer: DecoderLayer, config: ModelConfig, indexer_type: str) -> None:
        self.config, self.layer = config, layer.layer
        c, attention = config, weights.module(layer, "self_attn", MLA)
        self.scale = weights.constant(attention, "scale")
        if weights.constant(attention, "config") is not config:
            raise Unsuitable
        heads, latent, rope = c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
        self.input_norm = weights.norm(layer, "input_layernorm", c.hidden_size)
        self.q_a = weights.linear(attention, "q_a_proj", c.q_lora_rank, c.hidden_size)
        self.q_a_norm = weights.norm(attention, "q_a_layernorm", c.q_lora_rank)
        self.q_b = weights.linear(attention, "q_b_proj", heads * c.qk_head_dim, c.q_lora_rank)
        self.kv_a = weights.linear(attention, "kv_a_proj_with_mqa", latent + rope, c.hidden_size)
        self.kv_a_norm = weights.norm(attention, "kv_a_layernorm", latent)
        # Of every head first W_UK, then W_UV
        self.kv_b = weights.linear(attention, "kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), latent)
        self.o_proj = weights.linear(attention, "o_proj", c.hidden_size, heads * c.v_head_dim)
        self.index = None
        if indexer_type == "full":
            self.index = IndexStep(weights, weights.module(attention, "indexer", Indexer), config, self.layer)

    def __call__(self, rows: Rows, seen: Seen) -> None:
        c, latents = self.config, seen.slots.latents(self.layer)
        cos, sin = rows.angles[c.rope_interleave]
        do.rms_norm(rows.x, rows.h, *self.input_norm)
        do.linear(rows.c_q, rows.x, self.q_a, 1.0, False)
        do.rms_norm(rows.c_q, rows.c_q, *self.q_a_norm)
        do.linear(rows.q, rows.c_q, self.q_b, 1.0, False)
        do.combine_heads(rows.absorbed_plain, rows.q_plain, self.kv_b, c.num_attention_heads, 0)
        do.rotate(rows.absorbed_rotary, rows.q_rotary, cos, sin, c.rope_interleave)

        do.linear(rows.kv, rows.x, self.kv_a, 1.0, False)
        do.rms_norm(rows.kv_plain, rows.kv_plain, *self.kv_a_norm)
        do.rotate(rows.kv_rotary, rows.kv_rotary, cos, sin, c.rope_interleave)
        do.scatter(rows.kv, latents, seen.slots.new)

        if self.index is not None:
            self.index(rows, seen)
        do.attend(rows.o_latent, rows.absorbed, latents, seen.places, self.scale)
        do.split_heads(rows.o_heads, rows.o_latent, self.kv_b, c.num_attention_heads, c.qk_nope_head_dim)
        do.linear(rows.h, rows.o, self.o_proj, 1.0, True)


class IndexStep:
    """`Indexer.forward` and the selection."""

    def __init__(self, weights: WeightsInPlace, indexer: Indexer, config: ModelConfig, layer: int) -> None:
        self.config, self.layer = config, layer
        c, width = config, config.index_head_dim
        self.wq_b = weights.linear(indexer, "wq_b", c.index_n_heads * width, c.q_lora_rank)
        self.wk = weights.linear(indexer, "wk", width, c.hidden_size)
        k_norm = weights.module(indexer, "k_norm", nn.LayerNorm)
        self.k_weight, self.k_bias = weights.tensor(k_norm, "weight", width), weights.tensor(k_norm, "bias", width)
        self.eps = weights.constant(k_norm, "eps")
        self.weights_proj = weights.linear(indexer, "weights_proj", c.index_n_heads, c.hidden_size)
        self.scale = (c.index_n_heads * width) ** -0.5

    def __call__(self, rows: Rows, seen: Seen) -> None:
        c, keys = self.config, seen.slots.keys(self.layer)
        cos, sin = rows.angles[c.indexer_rope_interleave]
        do.linear(rows.index_k, rows.x, self.wk, 1.0, False)
        do.layer_norm(rows.index_k, rows.index_k, self.k_weight, self.k_bias, self.eps)
        do.rotate(rows.index_k_rotary, rows.index_k_rotary, cos, sin, c.indexer_rope_interleave)
        do.scatter(rows.index_k, keys, seen.slots.new)
        if not seen.choosing:
            return
        do.linear(rows.index_q, rows.c_q, self.wq_b, 1.0, False)
        do.rotate(rows.index_q_rotary, rows.index_q_rotary, cos, sin, c.indexer_rope_interleave)
        do.linear(rows.index_w, rows.x, self.weights_proj, self.scale, False)
        do.select(seen.places, rows.index_q_heads, rows.index_w, keys, seen.slots.sequences)


class FeedForwardStep:
    """`MLP.forward` or `MoE.forward`, with the norm before and the residual sum after it."""

    def __init__(self, weights: WeightsInPlace, layer: DecoderLayer, config: ModelConfig, mlp_type: str) -> None:
        self.config = c = config
        self.norm = weights.norm(layer, "post_attention_layernorm", c.hidden_size)
        self.sparse = mlp_type == "sparse"
        self.inner = c.moe_intermediate_size * c.n_shared_experts if self.sparse else c.intermediate_size
        mlp = weights.module(layer, "mlp", MoE if self.sparse else MLP)
        if self.sparse:
            router, many = weights.module(mlp, "gate", Router), c.n_routed_experts
            if weights.constant(router, "config") is not config:
                raise Unsuitable
            self.router = weights.tensor(router, "weight", many, c.hidden_size)
            self.bias = weights.tensor(router, "e_score_correction_bias", many)
            shape = many, c.hidden_size, c.moe_intermediate_size
            self.gate_up, self.down = weights.experts(mlp, "experts", shape, c.num_experts_per_tok)
            if self.inner:
                mlp = weights.module(mlp, "shared_experts", MLP)
        if self.inner:  # the dense block or the shared expert
            self.gate_proj = weights.linear(mlp, "gate_proj", self.inner, c.hidden_size)
            self.up_proj = weights.linear(mlp, "up_proj", self.inner, c.hidden_size)
            self.down_proj = weights.linear(mlp, "down_proj", c.hidden_size, self.inner)

    def __call__(self, rows: Rows, seen: Seen) -> None:
        c = self.config
        do.rms_norm(rows.x, rows.h, *self.norm)
        if self.sparse:
            do.linear(rows.scores, rows.x, self.router, 1.0, False)
            do.route(rows.chosen, rows.weights, rows.scores, self.bias, c.norm_topk_prob, c.routed_scaling_factor)
            do.experts(rows.h, rows.x, rows.chosen, rows.weights, self.gate_up, self.down, rows.expert)
        if self.inner:
            gate, up = rows.shared if self.sparse else rows.dense
            do.linear(gate, rows.x, self.gate_proj, 1.0, False)
            do.linear(up, rows.x, self.up_proj, 1.0, False)
            do.swiglu(gate, gate, up)
            do.linear(rows.h, gate, self.down_proj, 1.0, True)


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
        self, ids: list[int], slots: Slots, sparse: bool, keep: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [K, V] of the new tokens `keep` (by default of all) and final states of all [N, D].

        The pools hold the new tokens afterwards. A state is what the MTP modules go on from.
        """
        with self._turn:
            count = len(ids)
            rows = self._rows.get(count)
            if rows is None:
                rows = self._rows[count] = Rows(self.config, count)
            self._turn_to(rows, slots.positions)
            tokens = array("q", ids)
            do.gather(rows.h, self._embedding, _vector(tokens))
            seen = Seen(rows, slots, self.config.index_topk, sparse)
            for step in self._steps:
                step(rows, seen)
            do.rms_norm(rows.x, rows.h, *self._norm)
            states_ND = torch.empty(count, self.config.hidden_size)
            do.copy(Matrix.of(states_ND), rows.x if self.config.mtp_hidden == "after_norm" else rows.h)
            kept = array("q", range(count) if keep is None else keep)
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
