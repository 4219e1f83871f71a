"""Multi-head latent attention with DeepSeek sparse attention (GLM-5 report, section 2.1; DeepSeek-V3.2, section 2.1).

A token is kept as one latent of `kv_lora_rank` values and one rotated key of `qk_rope_head_dim` values that all heads
share. Which form runs (`ops/attention.py`):

- sparse attention gathers the selected latents and attends to them in the absorbed form; only where the context is
  so short that gathering would cost more than skipping, the selection masks the expanded form instead;
- up to `index_topk` keys every visible key is selected, so sparse attention *is* dense attention;
- dense attention: expanded or absorbed, whichever needs fewer multiplications for the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.model.cache import Cache
from glm5.model.indexer import Indexer
from glm5.model.output import Replay
from glm5.model.rows import Rows
from glm5.ops import attention, selection
from glm5.ops.indexer_loss import Index, indexer_kl
from glm5.ops.indexer_recall import indexer_recall
from glm5.ops.linear import Linear
from glm5.ops.norm import RMSNorm
from glm5.ops.rotary import Rotation, rotate
from glm5.ops.spans import Spans

GATHER_COST = 16
"""Multiplications that take as long as gathering one value and, in training, scattering its gradient (on a CPU)."""


class Pass:
    """What one forward pass carries from layer to layer.

    Not a dataclass: FSDP looks into dataclasses for tensors and hands on a copy, and what a layer writes would be lost.
    """

    def __init__(
        self,
        *,
        spans: Spans,
        rotation: Rotation,
        indexer_rotation: Rotation,
        sparse: bool,
        collect: frozenset[str],
        replay: Replay,
        cache: Cache | None,
        rows: Rows,
    ) -> None:
        self.spans, self.rotation, self.indexer_rotation = spans, rotation, indexer_rotation
        self.sparse, self.collect, self.replay, self.cache, self.rows = sparse, collect, replay, cache, rows
        # Of the last full-indexer layer; layers that share its indexer read them
        self.full_layer = 0
        self.index: Index | None = None
        self.selected_BTK: Tensor | None = None
        # What `collect` asked for
        self.selection: dict[int, Tensor] = {}
        self.kl_terms: dict[int, list[Tensor]] = {}
        self.recall_terms: dict[int, list[tuple[Tensor, Tensor]]] = {}


class MLA(nn.Module):
    """One attention layer; `indexer` is None where an earlier layer's selection is shared."""

    def __init__(
        self, config: ModelConfig, layer: int, indexer_type: str, *, dtype: torch.dtype, device: torch.device | None
    ) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        c = config
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, **place)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.latent_norm_eps, **place)
        self.q_b_proj = Linear(c.q_lora_rank, c.num_attention_heads * c.qk_head_dim, **place)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, **place)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.latent_norm_eps, **place)
        self.kv_b_proj = Linear(c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), **place)
        self.o_proj = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, **place)
        self.indexer = Indexer(c, **place) if indexer_type == "full" else None
        self.scale = c.qk_head_dim**-0.5
        self.sum_heads: Callable[[Tensor], Tensor] | None = None
        """Adds what other processes hold of a sum over heads (tensor parallel)."""

    def forward(self, x_BTD: Tensor, run: Pass) -> Tensor:
        """Attention output [B, T, D]; updates `run` with this layer's selection and what it collects."""
        c = self.config
        c_q_BTC = self.q_a_layernorm(self.q_a_proj(x_BTD))
        q_BTHN = self.q_b_proj(c_q_BTC).unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        q_nope_BTHN, q_rope_BTHR = q_BTHN.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        c_kv_BTC, k_rope_BTR = self.kv_a_proj_with_mqa(x_BTD).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        rope_BTHR = torch.cat((q_rope_BTHR, k_rope_BTR.unsqueeze(2)), dim=2)  # the shared key as one more head
        rope_BTHR = rotate(rope_BTHR, run.rotation)
        q_rope_BTHR, k_rope_BTR = rope_BTHR[:, :, :-1], rope_BTHR[:, :, -1]
        latents_BSC = torch.cat((self.kv_a_layernorm(c_kv_BTC), k_rope_BTR), dim=-1)
        latents_BSC = run.rows.gather(latents_BSC)
        if run.cache is not None:
            run.cache.append_latents(self.layer, latents_BSC)

        if self.indexer is not None:
            self._index(x_BTD, c_q_BTC, latents_BSC.shape[1], run)
        selected_BTK = run.selected_BTK
        if run.cache is not None and run.cache.attend is not None:
            self._record(run, c.index_topk)
            q_BTHC = self._absorb(q_nope_BTHN, q_rope_BTHR)
            o_BTHC = run.cache.attend(self.layer, q_BTHC, selected_BTK, c.kv_lora_rank, self.scale)
            return self.o_proj(self._unabsorb(o_BTHC).flatten(-2))
        if run.cache is not None:
            latents_BSC, selected_BTK = run.cache.read(self.layer, selected_BTK)
        self._record(run, latents_BSC.shape[1])
        self._collect(q_nope_BTHN, q_rope_BTHR, latents_BSC, selected_BTK, run)

        tokens, keys = x_BTD.shape[1], latents_BSC.shape[1]
        if not self._expanded_is_cheaper(tokens, keys, sparse=selected_BTK is not None):
            q_BTHC = self._absorb(q_nope_BTHN, q_rope_BTHR)
            if selected_BTK is None:
                o_BTHC = attention.absorbed_attention(q_BTHC, latents_BSC, run.spans, c.kv_lora_rank, self.scale)
            else:
                o_BTHC = attention.sparse_attention(q_BTHC, latents_BSC, selected_BTK, c.kv_lora_rank, self.scale)
            o_BTHV = self._unabsorb(o_BTHC)
        else:
            k_BSHN, v_BSHV = self._expand(latents_BSC)
            # Under autocast the rotated part is fp32 still; attention would round it with all the rest.
            q_BTHN = torch.cat((q_nope_BTHN, q_rope_BTHR.to(q_nope_BTHN.dtype)), dim=-1)
            o_BTHV = attention.expanded_attention(q_BTHN, k_BSHN, v_BSHV, run.spans, self.scale, selected_BTK)
        return self.o_proj(o_BTHV.flatten(-2))

    # ---- selection ----------------------------------------------------------------------------------------------
    def _index(self, x_BTD: Tensor, c_q_BTC: Tensor, keys: int, run: Pass) -> None:
        """Chooses for this layer and for those that share it; runs the indexer where anything depends on it."""
        assert self.indexer is not None
        topk, collecting = self.config.index_topk, bool(run.collect & {"indexer_kl", "indexer_recall"})
        run.full_layer = self.layer
        run.selected_BTK = run.replay.positions.get(self.layer) if run.sparse else None
        choosing = run.sparse and run.selected_BTK is None
        if run.cache is None and not collecting and (not choosing or keys <= topk):
            return
        with torch.set_grad_enabled("indexer_kl" in run.collect and torch.is_grad_enabled()):
            q_BTHI, k_BSI, w_BTH = self.indexer(x_BTD, c_q_BTC, run.indexer_rotation)
            k_BSI = run.rows.gather(k_BSI)
        if run.cache is not None:
            run.cache.append_keys(self.layer, k_BSI)
        if choosing:  # a selection has no gradient: the indexer learns from its KL loss alone
            if run.cache is not None:
                run.selected_BTK = run.cache.select(self.layer, q_BTHI, w_BTH, run.spans, topk)
            else:
                run.selected_BTK = selection.choose(q_BTHI, k_BSI, w_BTH, run.spans, topk)
        if collecting:
            run.index = q_BTHI, k_BSI if run.cache is None else run.cache.keys_of(self.layer), w_BTH

    def _record(self, run: Pass, keys: int) -> None:
        """The positions that this layer attends to, for whoever collects them."""
        if "selection" in run.collect and run.sparse:
            chosen = run.selected_BTK
            if chosen is None:
                chosen = selection.everything(run.spans, min(keys, self.config.index_topk))
            run.selection[self.layer] = chosen

    def _collect(
        self, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, latents_BSC: Tensor, selected_BTK: Tensor | None, run: Pass
    ) -> None:
        if "indexer_kl" in run.collect:
            assert run.index is not None
            with torch.no_grad():
                q_BTHC = self._absorb(q_nope_BTHN, q_rope_BTHR)
            term = indexer_kl(q_BTHC, latents_BSC, self.scale, run.index, run.spans, selected_BTK, self.sum_heads)
            run.kl_terms.setdefault(run.full_layer, []).append(term)
        if "indexer_recall" in run.collect:
            assert run.index is not None
            with torch.no_grad():
                q_BTHC = self._absorb(q_nope_BTHN, q_rope_BTHR)
            given = (q_BTHC, latents_BSC, self.scale, run.index, run.spans, self.config.index_topk, self.sum_heads)
            found = indexer_recall(*given)
            run.recall_terms.setdefault(run.full_layer, []).append(found)

    # ---- the two forms ------------------------------------------------------------------------------------------
    def _split_kv_b(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, N, C] and W_UV [H, V, C]."""
        c = self.config
        weight = self.kv_b_proj.effective_weight().view(c.num_attention_heads, -1, c.kv_lora_rank)
        w_uk_HNC, w_uv_HVC = weight.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        return w_uk_HNC, w_uv_HVC

    def _absorb(self, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor) -> Tensor:
        """Queries that score latents directly, [B, T, H, C + R]."""
        w_uk_HNC, _ = self._split_kv_b()
        return torch.cat((_per_head(q_nope_BTHN, w_uk_HNC), q_rope_BTHR), dim=-1)

    def _unabsorb(self, o_BTHC: Tensor) -> Tensor:
        """Values per head from weighted latents, [B, T, H, V]."""
        _, w_uv_HVC = self._split_kv_b()
        return _per_head(o_BTHC, w_uv_HVC.transpose(1, 2))

    def _expand(self, latents_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, S, H, N + R] and values [B, S, H, V]."""
        c = self.config
        c_kv_BSC, k_rope_BSR = latents_BSC.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv_BSHN = self.kv_b_proj(c_kv_BSC).unflatten(-1, (c.num_attention_heads, -1))
        k_nope_BSHN, v_BSHV = kv_BSHN.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope_BSHR = k_rope_BSR.to(k_nope_BSHN.dtype).unsqueeze(2).expand(-1, -1, c.num_attention_heads, -1)
        return torch.cat((k_nope_BSHN, k_rope_BSHR), dim=-1), v_BSHV

    def _expanded_is_cheaper(self, tokens: int, keys: int, *, sparse: bool) -> bool:
        """Multiplications of both forms: absorbed pays per query, expanded once per key and then for every key."""
        c = self.config
        both = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        rotary = c.num_attention_heads * c.qk_rope_head_dim
        attended = min(keys, c.index_topk) if sparse else keys
        per_latent = c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        if sparse:
            per_latent += GATHER_COST * (c.kv_lora_rank + c.qk_rope_head_dim)
        absorbed = tokens * (c.kv_lora_rank * both + attended * per_latent)
        expanded = keys * c.kv_lora_rank * both + tokens * keys * (both + rotary)
        return expanded < absorbed


def _per_head(x_BTHN: Tensor, weight_HNC: Tensor) -> Tensor:
    """x[..., h, :] @ weight[h] for every head, [B, T, H, C]."""
    batch, tokens = x_BTHN.shape[:2]
    y_HXC = torch.bmm(x_BTHN.flatten(0, 1).transpose(0, 1), weight_HNC)
    return y_HXC.transpose(0, 1).unflatten(0, (batch, tokens))
