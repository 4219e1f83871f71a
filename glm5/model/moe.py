"""Feed-forward layers: the dense SwiGLU block, the `noaux_tc` router, and the mixture of experts with a shared expert.

Router (DeepSeek-V3 report, section 2.1.2): sigmoid scores in fp32; a correction bias per expert enters the choice but
not the weights; chosen weights are normalised and scaled by `routed_scaling_factor`. The shared expert is not scaled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.model.output import RouterRecord
from glm5.model.rows import Rows, WholeRows
from glm5.ops.experts import Experts
from glm5.ops.linear import Linear
from glm5.ops.precision import full_precision


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, inner: int, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, dtype=dtype, device=device)
        self.up_proj = Linear(width, inner, dtype=dtype, device=device)
        self.down_proj = Linear(inner, width, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses `num_experts_per_tok` experts per token."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.config = config
        wide = torch.promote_types(dtype, torch.float32)
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        bias = torch.zeros(config.n_routed_experts, dtype=wide, device=device)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_ND: Tensor, replayed_NK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts [N, K], their weights [N, K] and all scores [N, E]; weights and scores in fp32.

        A token of which -1 was recorded chooses freely.
        """
        c = self.config
        wide = self.e_score_correction_bias.dtype
        with full_precision(x_ND):
            scores_NE = F.linear(x_ND.to(wide), self.weight.to(wide)).sigmoid()
        if replayed_NK is None:
            chosen_NK = self._choose(scores_NE)
        else:
            chosen_NK = torch.where(replayed_NK < 0, self._choose(scores_NE), replayed_NK)
        weights_NK = scores_NE.gather(1, chosen_NK)
        if c.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return chosen_NK, weights_NK * c.routed_scaling_factor, scores_NE

    @torch.no_grad()
    def _choose(self, scores_NE: Tensor) -> Tensor:
        c = self.config
        choice_NE = scores_NE + self.e_score_correction_bias
        if c.n_group > 1:  # keep the groups whose two best experts score highest
            by_group = choice_NE.unflatten(1, (c.n_group, -1))
            kept = by_group.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
            outside = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(1, kept, False)
            choice_NE = by_group.masked_fill(outside[..., None], float("-inf")).flatten(1)
        return choice_NE.topk(c.num_experts_per_tok, dim=-1).indices


class MoE(nn.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        c = config
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.gate = Router(c, **place)
        self.experts = Experts(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, **place)
        inner = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = MLP(c.hidden_size, inner, **place) if inner else None

    def forward(self, x_BTD: Tensor, replayed_BTK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, T, D]; chosen experts [B, T, K] and router scores [B, T, E] for whoever collects them."""
        x_ND = x_BTD.flatten(0, 1)
        replayed_NK = None if replayed_BTK is None else replayed_BTK.flatten(0, 1)
        chosen_NK, weights_NK, scores_NE = self.gate(x_ND, replayed_NK)
        y_ND = self.experts(x_ND, chosen_NK, weights_NK)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts(x_ND)
        lead = x_BTD.shape[:2]
        return y_ND.view_as(x_BTD), chosen_NK.unflatten(0, lead), scores_NE.unflatten(0, lead)


def record_router(
    layer: int, chosen_BTK: Tensor, scores_BTE: Tensor, valid_BT: Tensor, rows: Rows = WholeRows()
) -> RouterRecord:
    """Load and sequence-level balance loss of one layer; the balance loss is differentiable through the scores.

    The load counts the experts that ran. The balance loss counts those that the scores alone would have chosen, without
    the correction bias: the bias corrects the choice, the loss the scores. Of rows cut over processes, load and loss
    are this process's summands.
    """
    experts, per_token = scores_BTE.shape[-1], chosen_BTK.shape[-1]
    valid_BT1 = valid_BT[..., None].to(scores_BTE.dtype)
    tokens_B1 = rows.total(valid_BT1.sum(1)).clamp_min(1.0)

    def hits(choice_BTK: Tensor) -> Tensor:
        return torch.zeros_like(scores_BTE).scatter_(-1, choice_BTK, 1.0) * valid_BT1

    preferred_BTK = scores_BTE.detach().topk(per_token, dim=-1).indices
    frequency_BE = rows.total(hits(preferred_BTK).sum(1)) * experts / (per_token * tokens_B1)
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    probability_BE = (share_BTE * valid_BT1).sum(1) / tokens_B1
    return RouterRecord(
        layer=layer,
        experts_BTK=chosen_BTK,
        load_E=hits(chosen_BTK).sum((0, 1)).detach(),
        balance=(frequency_BE * probability_BE).sum(-1).mean(),
    )
