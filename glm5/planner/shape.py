"""`ModelShape`: a model as the planner sees it, a list of its tensors and the cost of its attention.

Built from `ModelConfig` (GLM-5: latent attention, DSA) or from `GLM47Config` (grouped-query attention, for comparison).
Tensor names and the FP8 split follow the published checkpoints: linear weights of attention, indexer, dense MLP and
experts are quantised; embeddings, head, norms, router and the MTP fusion stay in BF16; the router bias in FP32.
The number of weights is not trusted here: a test compares it with `ModelConfig.num_parameters`, which counts in
another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from glm5.config import ModelConfig
from glm5.config.glm47 import GLM47Config

Storage = Literal["linear", "expert", "table", "kept", "fp32"]
"""How a weight is stored: see `glm5.planner.weights.stored_bytes`."""
Split = Literal["tensor", "all", "none"]
"""Over which devices a weight is cut: one attention replica, all devices, or none (every device holds a copy)."""


@dataclass(frozen=True)
class Tensor:
    """`copies` equal matrices of `rows` x `columns`."""

    part: str
    name: str
    rows: int
    columns: int
    copies: int
    storage: Storage
    split: Split
    mtp: bool = False

    @property
    def parameters(self) -> int:
        """Weights in all copies."""
        return self.rows * self.columns * self.copies


@dataclass(frozen=True)
class Attention:
    """What attention keeps per token and what it computes per query and key, in one layer."""

    cache_values: int
    """Values of one token in one layer: latent and rotary key, or keys and values of all key heads."""
    rotary_values: int
    """Those of them that stay in BF16 when the cache is FP8 (the rotary key of MLA; none for grouped queries)."""
    cache_heads: int
    """Over how many devices the cache can be cut by heads: one latent is shared by all heads, so 1 for MLA."""
    decode_flops: int
    """Per query and key, all heads (MLA: absorbed form, 512 + 64 for the score and 512 for the sum)."""
    dense_flops: int
    """Per query and key in a dense prefill (MLA: expanded form, 256 + 256)."""
    topk: int = 0
    """Keys that DSA selects; 0 when attention is dense."""
    indexer_layers: int = 0
    indexer_values: int = 0
    """Values of the indexer's key of one token."""
    indexer_flops: int = 0
    """Per query and key, all index heads, in one layer that selects."""


@dataclass(frozen=True)
class ModelShape:
    """Tensors and costs of one model."""

    name: str
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    experts: int
    experts_per_token: int
    expert_width: int
    query_width: int
    """Width of all query heads together as the attention kernel reads them (MLA: absorbed)."""
    positions: int
    mtp_layers: int
    attention: Attention
    tensors: tuple[Tensor, ...]

    @property
    def sparse_layers(self) -> int:
        """Layers with routed experts, without MTP."""
        return sum(t.copies for t in self.tensors if t.name == "mlp.gate.weight" and not t.mtp)

    def parameters(self, *, mtp: bool = False) -> int:
        """All weights and router biases."""
        return sum(t.parameters for t in self.tensors if mtp or not t.mtp)

    def active_parameters(self, *, mtp: bool = False) -> int:
        """Those that one token touches: its experts, and the head but not the input embedding."""
        total = 0
        for t in self.tensors:
            if (mtp or not t.mtp) and t.part != "embedding":
                total += (
                    t.parameters * self.experts_per_token // self.experts if t.storage == "expert" else t.parameters
                )
        return total

    def without_dsa(self) -> ModelShape:
        """The same weights with dense attention: nothing selected, no indexer run."""
        return replace(self, attention=replace(self.attention, topk=0, indexer_layers=0))


def shape_of(config: ModelConfig | GLM47Config, name: str) -> ModelShape:
    """The planner's view of a configuration."""
    return _grouped_query(config, name) if isinstance(config, GLM47Config) else _latent(config, name)


def _latent(c: ModelConfig, name: str) -> ModelShape:
    heads, latent, rotary = c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    sparse = sum(kind == "sparse" for kind in c.mlp_layer_types)
    selecting = sum(kind == "full" for kind in c.indexer_types)
    tensors = [
        *_latent_attention(c, c.num_hidden_layers, selecting),
        *_mlp("dense MLP", "linear", "tensor", c.hidden_size, c.intermediate_size, c.num_hidden_layers - sparse),
        *_mixture(c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.n_shared_experts, sparse),
        *_ends(c.hidden_size, c.vocab_size, c.num_hidden_layers),
    ]
    if c.num_nextn_predict_layers:
        depth = c.num_nextn_predict_layers
        layer = [
            *_latent_attention(c, depth, depth),
            *_mixture(c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.n_shared_experts, depth),
        ]
        tensors += _mtp(layer, c.hidden_size, depth)
    absorbed = (latent + rotary) + latent
    return ModelShape(
        name=name, hidden=c.hidden_size, layers=c.num_hidden_layers, heads=heads, vocabulary=c.vocab_size,
        experts=c.n_routed_experts, experts_per_token=c.num_experts_per_tok, expert_width=c.moe_intermediate_size,
        query_width=heads * absorbed, positions=c.max_position_embeddings, mtp_layers=c.num_nextn_predict_layers,
        attention=Attention(
            cache_values=latent + rotary, rotary_values=rotary, cache_heads=1,
            decode_flops=2 * heads * absorbed, dense_flops=2 * heads * (c.qk_head_dim + c.v_head_dim),
            topk=c.index_topk, indexer_layers=selecting, indexer_values=c.index_head_dim,
            indexer_flops=2 * c.index_n_heads * c.index_head_dim,
        ),
        tensors=tuple(tensors),
    )  # fmt: skip


def _grouped_query(c: GLM47Config, name: str) -> ModelShape:
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    sparse = c.num_hidden_layers - c.first_k_dense_replace

    def attention(copies: int) -> list[Tensor]:
        rows = [("q_proj", query, c.hidden_size), ("k_proj", key, c.hidden_size), ("v_proj", key, c.hidden_size),
                ("o_proj", c.hidden_size, query)]  # fmt: skip
        return [
            *(Tensor("attention", n, r, k, copies, "linear", "tensor") for n, r, k in rows),
            Tensor("attention", "q, k, v biases", 1, query + 2 * key, copies, "kept", "tensor"),
            Tensor("attention", "q_norm and k_norm", 2, c.head_dim, copies, "kept", "none"),
        ]

    tensors = [
        *attention(c.num_hidden_layers),
        *_mlp("dense MLP", "linear", "tensor", c.hidden_size, c.intermediate_size, c.first_k_dense_replace),
        *_mixture(c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.n_shared_experts, sparse),
        *_ends(c.hidden_size, c.vocab_size, c.num_hidden_layers),
    ]
    depth = c.num_nextn_predict_layers
    mixture = _mixture(c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.n_shared_experts, depth)
    tensors += _mtp([*attention(depth), *mixture], c.hidden_size, depth)
    pair = 2 * c.num_attention_heads * 2 * c.head_dim
    return ModelShape(
        name=name, hidden=c.hidden_size, layers=c.num_hidden_layers, heads=c.num_attention_heads,
        vocabulary=c.vocab_size, experts=c.n_routed_experts, experts_per_token=c.num_experts_per_tok,
        expert_width=c.moe_intermediate_size, query_width=2 * query, positions=c.max_position_embeddings,
        mtp_layers=depth,
        attention=Attention(cache_values=2 * key, rotary_values=0, cache_heads=c.num_key_value_heads,
                            decode_flops=pair, dense_flops=pair),
        tensors=tuple(tensors),
    )  # fmt: skip


def _latent_attention(c: ModelConfig, copies: int, selecting: int) -> Iterator[Tensor]:
    d, heads = c.hidden_size, c.num_attention_heads
    index_width = c.index_n_heads * c.index_head_dim

    def linear(name: str, rows: int, columns: int, split: Split) -> Tensor:
        return Tensor("attention", name, rows, columns, copies, "linear", split)

    yield linear("q_a_proj", c.q_lora_rank, d, "none")
    yield linear("q_b_proj", heads * c.qk_head_dim, c.q_lora_rank, "tensor")
    yield linear("kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, d, "none")
    yield linear("kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, "tensor")
    yield linear("o_proj", d, heads * c.v_head_dim, "tensor")
    yield Tensor("attention", "q_a and kv_a norms", 1, c.q_lora_rank + c.kv_lora_rank, copies, "kept", "none")
    if selecting:  # every device needs the whole selection, so the indexer is not cut
        yield Tensor("indexer", "wq_b", index_width, c.q_lora_rank, selecting, "linear", "none")
        yield Tensor("indexer", "wk", c.index_head_dim, d, selecting, "linear", "none")
        yield Tensor("indexer", "weights_proj", c.index_n_heads, d, selecting, "kept", "none")
        yield Tensor("indexer", "k_norm", 2, c.index_head_dim, selecting, "kept", "none")


def _mlp(part: str, storage: Storage, split: Split, hidden: int, width: int, copies: int) -> Iterator[Tensor]:
    if copies:
        yield Tensor(part, "gate_proj and up_proj", width, hidden, 2 * copies, storage, split)
        yield Tensor(part, "down_proj", hidden, width, copies, storage, split)


def _mixture(hidden: int, width: int, experts: int, shared: int, layers: int) -> Iterator[Tensor]:
    if layers:
        yield Tensor("router", "mlp.gate.weight", experts, hidden, layers, "kept", "none")
        yield Tensor("router", "mlp.gate.e_score_correction_bias", 1, experts, layers, "fp32", "none")
        if shared:
            yield from _mlp("shared experts", "linear", "tensor", hidden, width * shared, layers)
        yield from _mlp("routed experts", "expert", "all", hidden, width, layers * experts)


def _ends(hidden: int, vocabulary: int, layers: int) -> Iterator[Tensor]:
    yield Tensor("norms", "norms", 1, hidden, 2 * layers + 1, "kept", "none")
    yield Tensor("embedding", "embed_tokens", vocabulary, hidden, 1, "table", "tensor")
    yield Tensor("output head", "lm_head", vocabulary, hidden, 1, "table", "tensor")


def _mtp(layer: list[Tensor], hidden: int, depth: int) -> list[Tensor]:
    own = [
        *layer,
        Tensor("MTP fusion", "eh_proj", hidden, 2 * hidden, depth, "kept", "none"),
        Tensor("norms", "norms, enorm, hnorm, shared_head.norm", 1, hidden, 5 * depth, "kept", "none"),
    ]
    return [replace(t, mtp=True) for t in own]
