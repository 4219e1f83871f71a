"""One decoder layer, and the multi-token-prediction module, which is a decoder layer with an input and an output side.

MTP (DeepSeek-V3 report, section 2.2; GLM-5 report, section 2.1): the state of token i and the embedding of token i + 1
are normalised, joined (embedding first) and projected; a decoder layer and a norm follow; the shared head then predicts
token i + 2. More drafts come from the same module, fed with its own normed output: GLM-5 trains three such steps with
shared parameters. `index_share_for_mtp_iteration` (GLM-5.2) is read and written but each step selects for itself: the
report does not say what a later step shares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.model.mla import MLA, Pass
from glm5.model.moe import MLP, MoE, record_router
from glm5.model.output import RouterRecord
from glm5.ops.linear import Linear
from glm5.ops.norm import RMSNorm


class DecoderLayer(nn.Module):
    """`h += attention(norm(h)); h += feed_forward(norm(h))`."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        mlp_type: str,
        indexer_type: str,
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **place)
        self.self_attn = MLA(config, layer, indexer_type, **place)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **place)
        self.mlp: MLP | MoE
        if mlp_type == "sparse":
            self.mlp = MoE(config, **place)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, **place)

    def forward(self, h_BTD: Tensor, run: Pass) -> tuple[Tensor, RouterRecord | None]:
        """New state [B, T, D]; the router's record if this layer has one and it is collected."""
        h_BTD = h_BTD + self.self_attn(self.input_layernorm(h_BTD), run)
        x_BTD = self.post_attention_layernorm(h_BTD)
        if isinstance(self.mlp, MLP):
            return h_BTD + self.mlp(x_BTD), None
        y_BTD, chosen_BTK, scores_BTE = self.mlp(x_BTD, run.replay.experts.get(self.layer))
        record = None
        if "router" in run.collect:
            record = record_router(self.layer, chosen_BTK, scores_BTE, run.spans.valid_BT, run.rows)
        return h_BTD + y_BTD, record


class SharedHead(nn.Module):
    """The norm in front of the output head, which belongs to the trunk."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.norm(h_BTD)


class MTPModule(DecoderLayer):
    """Drafts one more token; `layer` counts on after the trunk, as in the checkpoint."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__(config, layer, mlp_type="sparse", indexer_type="full", dtype=dtype, device=device)
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **place)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **place)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, **place)
        self.shared_head = SharedHead(config, **place)

    def draft(self, h_BTD: Tensor, next_embedding_BTD: Tensor, run: Pass) -> tuple[Tensor, RouterRecord | None]:
        """State [B, T, D] for the output head and the next draft step, from the state of token i and token i + 1."""
        z_BTD = self.eh_proj(torch.cat((self.enorm(next_embedding_BTD), self.hnorm(h_BTD)), dim=-1))
        h_BTD, record = self(z_BTD, run)
        return self.shared_head(h_BTD), record
