"""The layers of a decoder (`decode.py`): `layer.py`, `mla.py` (absorbed form), `indexer.py` and `moe.py` once more.

Written as calls of `ops/decoding.py` on the activations of a few tokens. The modules are the truth; nothing here is
differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.model.indexer import Indexer
from glm5.model.layer import DecoderLayer, MTPModule, SharedHead
from glm5.model.mla import MLA
from glm5.model.moe import MLP, MoE, Router
from glm5.model.slots import Slots
from glm5.model.weights_in_place import Unsuitable, WeightsInPlace
from glm5.ops import decoding as do
from glm5.ops.decoding import Matrix


class Rows:
    """The activations of `batch` tokens, reused by every layer and step."""

    def __init__(self, config: ModelConfig, batch: int) -> None:
        c = config
        self.batch = batch
        self._owned: list[Tensor] = []
        heads, latent = c.num_attention_heads, c.kv_lora_rank
        self.h, self.x = self._new(c.hidden_size), self._new(c.hidden_size)
        self.joined = self._new(2 * c.hidden_size)
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
        routed = (*c.sparse_layers, c.num_hidden_layers)  # the last one is the first MTP module's
        self.experts_LNK = torch.empty(len(routed), batch, c.num_experts_per_tok, dtype=torch.int64)
        self.chosen = {layer: Matrix.of(self.experts_LNK[i]) for i, layer in enumerate(routed)}
        self.weights = self._new(c.num_experts_per_tok)
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
            do.select(self.places, None, None, slots.keys[0], slots.sequences)


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
        c, latents = self.config, seen.slots.latents[self.layer]
        cos, sin = rows.angles[c.rope_interleave]
        do.rms_norm(rows.x, rows.h, *self.input_norm)
        do.linear(rows.c_q, rows.x, self.q_a, 1.0, False)
        do.rms_norm(rows.c_q, rows.c_q, *self.q_a_norm)
        if self.index is not None:
            self.index(rows, seen)  # and the chosen latents arrive while the queries are made

        do.linear(rows.q, rows.c_q, self.q_b, 1.0, False)
        do.combine_heads(rows.absorbed_plain, rows.q_plain, self.kv_b, c.num_attention_heads, 0)
        do.rotate(rows.absorbed_rotary, rows.q_rotary, cos, sin, c.rope_interleave)

        do.linear(rows.kv, rows.x, self.kv_a, 1.0, False)
        do.rms_norm(rows.kv_plain, rows.kv_plain, *self.kv_a_norm)
        do.rotate(rows.kv_rotary, rows.kv_rotary, cos, sin, c.rope_interleave)
        do.scatter(rows.kv, latents, seen.slots.new)

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
        c, keys = self.config, seen.slots.keys[self.layer]
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
        latents = seen.slots.latents[self.layer]
        do.select(seen.places, rows.index_q_heads, rows.index_w, keys, seen.slots.sequences, ask=latents)


class FeedForwardStep:
    """`MLP.forward` or `MoE.forward`, with the norm before and the residual sum after it."""

    def __init__(self, weights: WeightsInPlace, layer: DecoderLayer, config: ModelConfig, mlp_type: str) -> None:
        self.config, self.layer = config, layer.layer
        c = config
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
            chosen = rows.chosen[self.layer]
            do.route(chosen, rows.weights, rows.scores, self.bias, c.norm_topk_prob, c.routed_scaling_factor)
            do.experts(rows.h, rows.x, chosen, rows.weights, self.gate_up, self.down, rows.expert)
        if self.inner:
            gate, up = rows.shared if self.sparse else rows.dense
            do.linear(gate, rows.x, self.gate_proj, 1.0, False)
            do.linear(up, rows.x, self.up_proj, 1.0, False)
            do.swiglu(gate, gate, up)
            do.linear(rows.h, gate, self.down_proj, 1.0, True)


class DraftStep:
    """`MTPModule.draft` of the first module, on the embeddings of the next tokens in `rows.h`."""

    def __init__(self, weights: WeightsInPlace, model: nn.Module, config: ModelConfig) -> None:
        """Raises Unsuitable, also for a model without such a module."""
        width = self.width = config.hidden_size
        module = weights.module(weights.module(model, "mtp", nn.ModuleList), "0", MTPModule)
        self.layer: int = weights.constant(module, "layer")
        self.enorm, self.hnorm = weights.norm(module, "enorm", width), weights.norm(module, "hnorm", width)
        self.eh_proj = weights.linear(module, "eh_proj", width, 2 * width)
        self.attention = AttentionStep(weights, module, config, "full")
        self.feed_forward = FeedForwardStep(weights, module, config, "sparse")
        self.norm = weights.norm(weights.module(module, "shared_head", SharedHead), "norm", width)

    def __call__(self, rows: Rows, seen: Seen, states: Matrix) -> None:
        do.rms_norm(rows.joined.cut(0, self.width), rows.h, *self.enorm)
        do.rms_norm(rows.joined.cut(self.width, self.width), states, *self.hnorm)
        do.linear(rows.h, rows.joined, self.eh_proj, 1.0, False)
        self.attention(rows, seen)
        self.feed_forward(rows, seen)
        do.rms_norm(rows.x, rows.h, *self.norm)
