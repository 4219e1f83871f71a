"""Decoding of small fp32 models on a CPU: one token per row, without the cost of starting operators.

`Decoder` is the forward pass of `transformer.py`, `layer.py`, `mla.py` (absorbed form), `indexer.py` and `moe.py` for
exactly one new token in each of a few rows of a `LatentCache`, written as calls of `ops/decoding.py`. The modules stay
the truth: tests compare the two over every part, and whatever this file does not know (adapters, hooks, other dtypes,
grouped routers, replaced modules, packed rows) is left to them.

Nothing is derived from the weights. The decoder keeps where they lie, reads them there, and checks before every step
that the model still consists of the same modules and memory. Weights that train or are loaded are seen at once.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from glm5.config import ModelConfig
from glm5.model.cache import Cache, LatentCache
from glm5.model.indexer import Indexer
from glm5.model.layer import DecoderLayer
from glm5.model.mla import MLA
from glm5.model.moe import MLP, MoE, Router
from glm5.model.weights_in_place import Unsuitable, WeightsInPlace
from glm5.ops import decoding as do
from glm5.ops.decoding import Matrix
from glm5.ops.rotary import rotation

FEW_ROWS = 64
"""With more rows PyTorch's operators, whose start the rows share, are faster."""
MOST_PRODUCTS = 1 << 25
"""Multiplications of a token. Beyond, several threads gain more than what starting operators costs."""
TABLE = 64
"""Positions whose rotary tables are computed together."""


class Rows:
    """The activations of one token in each of `batch` rows, reused by every layer and step."""

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
        absorbed = self._new(heads * (latent + c.qk_rope_head_dim)).split(heads)
        self.absorbed_plain, self.absorbed_rotary = absorbed.cut(0, latent), absorbed.cut(latent, c.qk_rope_head_dim)
        self.o_latent = self._new(heads * latent).split(heads)
        self.o = self._new(heads * c.v_head_dim)
        self.o_heads = self.o.split(heads)
        self.index_q = self._new(c.index_n_heads * c.index_head_dim)
        self.index_q_rotary = self.index_q.split(c.index_n_heads).cut(0, c.qk_rope_head_dim)
        self.index_k, self.index_w = self._new(c.index_head_dim), self._new(c.index_n_heads)
        self.selected = self._new(c.index_topk, torch.int64)
        self.scores = self._new(c.n_routed_experts)
        self.chosen, self.weights = self._new(c.num_experts_per_tok, torch.int64), self._new(c.num_experts_per_tok)
        self.expert = self._new(2 * c.moe_intermediate_size).lines(0, 1)
        inner = c.moe_intermediate_size * c.n_shared_experts
        self.shared = self._new(inner), self._new(inner)
        self.dense = self._new(c.intermediate_size), self._new(c.intermediate_size)
        # What attention and selection do for one row after another
        own = range(batch)
        self.o_latent_of = [self.o_latent.lines(row * heads, heads) for row in own]
        self.absorbed_of = [absorbed.lines(row * heads, heads) for row in own]
        self.index_of = [(self.index_q.lines(row, 1).split(c.index_n_heads), self.index_w.lines(row, 1)) for row in own]
        self.selected_of = [self.selected.address + 8 * row * c.index_topk for row in own]

    def _new(self, width: int, dtype: torch.dtype = torch.float32) -> Matrix:
        self._owned.append(torch.empty(self.batch, width, dtype=dtype))
        return Matrix.of(self._owned[-1])


class Place:
    """Where a step writes and what it sees: the rows of the cache, rotary tables, the last selection."""

    def __init__(self, cache: LatentCache, sparse: bool, tables: dict[bool, tuple[Matrix, Matrix]]) -> None:
        self.cache, self.sparse, self.tables = cache, sparse, tables
        self.keys = cache.length + 1
        self.selected = False
        """Whether the last full-indexer layer chose among the keys, rather than taking all."""

    def new(self, rows_BSC: Tensor) -> Matrix:
        """The new entry of every row of one layer's cache."""
        batch, capacity, width = rows_BSC.shape
        return Matrix(rows_BSC.data_ptr() + 4 * self.cache.length * width, batch, width, capacity * width)

    def all(self, rows_BSC: Tensor, row: int) -> Matrix:
        """Everything that one row of one layer's cache holds, the new entry included."""
        _, capacity, width = rows_BSC.shape
        return Matrix(rows_BSC.data_ptr() + 4 * row * capacity * width, self.keys, width, width)


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
        self.per_head = c.qk_nope_head_dim + c.v_head_dim
        kv_b = weights.linear(attention, "kv_b_proj", heads * self.per_head, latent)
        self.w_uk, self.w_uv = kv_b.lines(0, c.qk_nope_head_dim), kv_b.lines(c.qk_nope_head_dim, c.v_head_dim)
        self.o_proj = weights.linear(attention, "o_proj", c.hidden_size, heads * c.v_head_dim)
        self.index = None
        if indexer_type == "full":
            self.index = IndexStep(weights, weights.module(attention, "indexer", Indexer), config, self.layer)

    def __call__(self, rows: Rows, place: Place) -> None:
        c, latents_BSC = self.config, place.cache.latents[self.layer]
        latent, rope = c.kv_lora_rank, c.qk_rope_head_dim
        cos, sin = place.tables[c.rope_interleave]
        do.rms_norm(rows.x, rows.h, *self.input_norm)
        do.linear(rows.c_q, rows.x, self.q_a, 1.0, False)
        do.rms_norm(rows.c_q, rows.c_q, *self.q_a_norm)
        do.linear(rows.q, rows.c_q, self.q_b, 1.0, False)
        do.combine_heads(rows.absorbed_plain, rows.q_plain, self.w_uk, c.num_attention_heads, self.per_head)
        do.rotate(rows.absorbed_rotary, rows.q_rotary, cos, sin, c.rope_interleave)

        new = place.new(latents_BSC)
        do.linear(rows.kv, rows.x, self.kv_a, 1.0, False)
        do.rms_norm(new.cut(0, latent), rows.kv_plain, *self.kv_a_norm)
        do.rotate(new.cut(latent, rope), rows.kv_rotary, cos, sin, c.rope_interleave)

        if self.index is not None:
            self.index(rows, place)
        for row, (o, q, selected) in enumerate(zip(rows.o_latent_of, rows.absorbed_of, rows.selected_of, strict=True)):
            places = selected if place.selected else 0
            do.attend(o, q, place.all(latents_BSC, row), places, c.index_topk, self.scale)
        do.split_heads(rows.o_heads, rows.o_latent, self.w_uv, c.num_attention_heads, self.per_head)
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

    def __call__(self, rows: Rows, place: Place) -> None:
        c, keys_BSI = self.config, place.cache.keys[self.layer]
        cos, sin = place.tables[c.indexer_rope_interleave]
        new = place.new(keys_BSI)
        do.linear(rows.index_k, rows.x, self.wk, 1.0, False)
        do.layer_norm(new, rows.index_k, self.k_weight, self.k_bias, self.eps)
        rotary = new.cut(0, c.qk_rope_head_dim)
        do.rotate(rotary, rotary, cos, sin, c.indexer_rope_interleave)
        place.selected = place.sparse and place.keys > c.index_topk
        if not place.selected:
            return
        do.linear(rows.index_q, rows.c_q, self.wq_b, 1.0, False)
        do.rotate(rows.index_q_rotary, rows.index_q_rotary, cos, sin, c.indexer_rope_interleave)
        do.linear(rows.index_w, rows.x, self.weights_proj, self.scale, False)
        for row, ((q, w), selected) in enumerate(zip(rows.index_of, rows.selected_of, strict=True)):
            do.select(selected, q, place.all(keys_BSI, row), w, c.index_topk)


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

    def __call__(self, rows: Rows, place: Place) -> None:
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
        self._full_layers = [i for i, kind in enumerate(c.indexer_types) if kind == "full"]
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
        self._tables: dict[bool, Any] = {}
        self._tables_start = -1
        self._turn = threading.Lock()

    @property
    def products(self) -> int:
        """Multiplications of a token without those of attention and selection."""
        return self._weights.products

    def current(self, config: ModelConfig) -> bool:
        """Whether the model still consists of what this decoder reads."""
        return self.config is config and 2 * len(self._layers) == len(self._steps) and self._weights.current()

    def fits(self, cache: LatentCache) -> bool:
        """Whether the cache holds rows of every layer and of no other."""
        return list(cache.latents) == list(range(len(self._steps) // 2)) and list(cache.keys) == self._full_layers

    def step(self, ids: list[int], cache: LatentCache, sparse: bool) -> Tensor:
        """Logits [B, 1, V] after one more token per row, which the cache then holds."""
        with self._turn:
            rows = self._rows.get(len(ids))
            if rows is None:
                rows = self._rows[len(ids)] = Rows(self.config, len(ids))
            cache.claim(len(ids), 1)
            place = Place(cache, sparse, self._rotation(cache.length))
            for row, token in enumerate(ids):
                do.copy(rows.h.lines(row, 1), self._embedding.lines(token, 1))
            for step in self._steps:
                step(rows, place)
            do.rms_norm(rows.x, rows.h, *self._norm)
            logits_B1V = torch.empty(len(ids), 1, self.config.vocab_size)
            do.linear(Matrix.of(logits_B1V), rows.x, self._lm_head, 1.0, False)
            cache.commit()
        return logits_B1V

    def _rotation(self, position: int) -> dict[bool, tuple[Matrix, Matrix]]:
        """Per layout cos and sin of one position, from tables of the `TABLE` positions around it."""
        c, start = self.config, position // TABLE * TABLE
        if start != self._tables_start:
            positions_1T = torch.arange(start, start + TABLE)[None]
            for layout in {c.rope_interleave, c.indexer_rope_interleave}:
                self._tables[layout] = rotation(
                    positions_1T, c.qk_rope_head_dim, c.rope_theta, torch.float32, interleaved=layout
                )
            self._tables_start = start
        return {
            layout: (
                Matrix.of(table.cos_BT1R).lines(position - start, 1),
                Matrix.of(table.sin_BT1R).lines(position - start, 1),
            )
            for layout, table in self._tables.items()
        }


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
        if self._decoder is not None and not self._decoder.current(config):
            self._decoder = None  # and with it the memory that the model has left
        if not _suits(ids_BT, cache):
            return None
        if self._decoder is None:
            try:
                self._decoder = Decoder(model, config)
            except Unsuitable:
                return None
        many = self._decoder.products > MOST_PRODUCTS and torch.get_num_threads() > 1
        if many or not self._decoder.fits(cache):
            return None
        return self._decoder.step(ids_BT[:, 0].tolist(), cache, sparse)


def _suits(ids_BT: Tensor, cache: LatentCache) -> bool:
    """Few rows, each one segment, in fp32 on a CPU, and nobody who wants gradients, casts or a trace."""
    first = next(iter(cache.latents.values()))
    return (
        ids_BT.shape[0] <= FEW_ROWS
        and type(ids_BT) is Tensor
        and first.dtype == torch.float32
        and first.device.type == "cpu"
        and (cache.segments_BS is None or cache.length == 0)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not has_any_global_hook()
    )
