"""Attention over latents (MLA), dense and sparse, in blocks of queries; never a T x S matrix.

Two forms of the same mathematics:
- expanded: keys and values per head (short rows and dense prefill), through PyTorch's fused attention;
- absorbed: W_UK folded into the query, W_UV into the output, so that every head attends to the one latent row of
  `kv_lora_rank + qk_rope_head_dim` values per token (decode, and sparse attention at any length).

Blocks are recomputed in the backward pass, so that training memory grows with T as well.
`reference.dense_attention` and `reference.sparse_attention` are the truth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glm5.ops import reference
from glm5.ops.masked_attention import MaskedAttention
from glm5.ops.precision import full_precision
from glm5.ops.spans import Spans
from glm5.ops.sparse_attention import SparseAttention

BLOCK_BUDGET = 1 << 23
"""Elements of the largest temporary of one block of queries (gathered latents, or scores): 32 MB in fp32."""


def expanded_attention(
    q_BTHN: Tensor, k_BSHN: Tensor, v_BSHV: Tensor, spans: Spans, scale: float, selected_BTK: Tensor | None = None
) -> Tensor:
    """Attention [B, T, H, V] with keys and values per head, over every visible key or over the selected ones.

    Key and value widths may differ. What a query may see becomes a mask of one block of queries at a time.
    """
    tokens, keys, value_width = q_BTHN.shape[1], k_BSHN.shape[1], v_BSHV.shape[-1]
    plain_causal = selected_BTK is None and spans.single and (tokens == keys or tokens == 1)
    if not plain_causal and _trains_in_bf16_on_cpu(q_BTHN, keys):
        mask_BTS = reference.visible(spans.lo_BT, spans.hi_BT, keys)
        if selected_BTK is not None:
            mask_BTS = reference.chosen(selected_BTK, keys)
        q, k, v = (x.to(torch.bfloat16) for x in (q_BTHN, k_BSHN, v_BSHV))
        with full_precision(q):
            out: Tensor = MaskedAttention.apply(q, k, v, mask_BTS, scale)
        return out * spans.valid_BT[..., None, None]
    # The fused CPU kernel wants equal widths; zero columns change neither scores nor the columns that are kept.
    wide = max(q_BTHN.shape[-1], value_width)
    q_BTHN, k_BSHN, v_BSHV = (F.pad(x, (0, wide - x.shape[-1])) for x in (q_BTHN, k_BSHN, v_BSHV))
    if plain_causal:
        return _fused(q_BTHN, k_BSHN, v_BSHV, None, tokens == keys, scale)[..., :value_width]

    def block(q_BQHN: Tensor, k_BSHN: Tensor, v_BSHV: Tensor, lo_BQ: Tensor, hi_BQ: Tensor, *chosen: Tensor) -> Tensor:
        real_BQ = hi_BQ > lo_BQ
        mask_BQS = reference.chosen(chosen[0], keys) if chosen else reference.visible(lo_BQ, hi_BQ, keys)
        mask_BQS = mask_BQS | ~real_BQ[..., None]  # a row without any key would give NaN
        return _fused(q_BQHN, k_BSHN, v_BSHV, mask_BQS, False, scale)[..., :value_width] * real_BQ[..., None, None]

    by_query = (spans.lo_BT, spans.hi_BT) if selected_BTK is None else (spans.lo_BT, spans.hi_BT, selected_BTK)
    return _in_blocks(block, q_BTHN, (k_BSHN, v_BSHV), by_query, per_query=q_BTHN.shape[0] * keys)


def _trains_in_bf16_on_cpu(q_BTHN: Tensor, keys: int) -> bool:
    """Whether a mask is better served by `MaskedAttention` than by PyTorch's fused kernel.

    So it is in training, in bf16 or under its autocast, on a CPU, while the probabilities of the whole batch fit the
    budget (`python -m benchmarks.train`, rows of 256); once blocks must be recomputed the fused kernel is faster.
    """
    if q_BTHN.device.type != "cpu" or not (torch.is_grad_enabled() and q_BTHN.requires_grad):
        return False
    autocast = torch.is_autocast_enabled("cpu") and q_BTHN.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocast else q_BTHN.dtype
    batch, tokens, heads = q_BTHN.shape[:3]
    return dtype == torch.bfloat16 and batch * tokens * heads * keys <= BLOCK_BUDGET


def _fused(
    q_BTHN: Tensor, k_BSHN: Tensor, v_BSHN: Tensor, mask_BTS: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """PyTorch's fused attention in this room's order of dimensions."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHN, k_BSHN, v_BSHN))
    mask = None if mask_BTS is None else mask_BTS[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).transpose(1, 2)


def absorbed_attention(q_BTHC: Tensor, latents_BSC: Tensor, spans: Spans, value_width: int, scale: float) -> Tensor:
    """Dense attention over the latents themselves [B, T, H, value_width]; cheap when T is small (decode)."""
    sees_all = spans.single and q_BTHC.shape[1] == 1

    def block(q_BQHC: Tensor, latents_BSC: Tensor, lo_BQ: Tensor, hi_BQ: Tensor) -> Tensor:
        scores_BQHS = _scores(q_BQHC.flatten(1, 2), latents_BSC).unflatten(1, q_BQHC.shape[1:3]) * scale
        if sees_all:
            p_BQHS = torch.softmax(scores_BQHS, dim=-1)
        else:
            mask_BQS = reference.visible(lo_BQ, hi_BQ, latents_BSC.shape[1])
            p_BQHS = reference.masked_softmax(scores_BQHS, mask_BQS[:, :, None])
        values = latents_BSC[..., :value_width]
        return (p_BQHS.to(values.dtype).flatten(1, 2) @ values).unflatten(1, q_BQHC.shape[1:3])

    per_query = q_BTHC.shape[0] * q_BTHC.shape[2] * latents_BSC.shape[1]
    return _in_blocks(block, q_BTHC, (latents_BSC,), (spans.lo_BT, spans.hi_BT), per_query=per_query)


def sparse_attention(
    q_BTHC: Tensor, latents_BSC: Tensor, selected_BTK: Tensor, value_width: int, scale: float
) -> Tensor:
    """Absorbed attention [B, T, H, value_width] over the selected latents; only those are gathered and read.

    Positions ascend, -1 padded. Raises ValueError on a CPU for one outside the latents (a GPU would have to wait).
    """
    if selected_BTK.device.type == "cpu" and selected_BTK.numel() and int(selected_BTK.max()) >= latents_BSC.shape[1]:
        raise ValueError(f"position {int(selected_BTK.max())} is outside the {latents_BSC.shape[1]} latents of a row")
    if torch.is_autocast_enabled(q_BTHC.device.type):  # the products' dtype is fixed here, for both passes
        dtype = torch.get_autocast_dtype(q_BTHC.device.type)
        q_BTHC, latents_BSC = q_BTHC.to(dtype), latents_BSC.to(dtype)
    queries = max(1, BLOCK_BUDGET // (selected_BTK.shape[2] * max(latents_BSC.shape[2], q_BTHC.shape[2])))
    with full_precision(q_BTHC):
        out: Tensor = SparseAttention.apply(q_BTHC, latents_BSC, selected_BTK, value_width, scale, queries)
    return out


def gather_latents(latents_BSC: Tensor, selected_BTK: Tensor) -> Tensor:
    """The selected rows [B, T, K, C]; missing entries (-1) give row 0, which the caller masks."""
    batch, keys, width = latents_BSC.shape
    rows = selected_BTK.clamp_min(0)
    if batch > 1:
        rows = rows + torch.arange(batch, device=rows.device)[:, None, None] * keys
    return latents_BSC.reshape(batch * keys, width).index_select(0, rows.flatten()).view(*selected_BTK.shape, width)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """`q @ k^T` in fp32 (fp64 stays)."""
    scores = q @ k.transpose(-1, -2)
    return scores if scores.dtype == torch.float64 else scores.float()


def _in_blocks(
    block: Callable[..., Tensor],
    q_BTHC: Tensor,
    whole: tuple[Tensor, ...],
    by_query: tuple[Tensor, ...],
    *,
    per_query: int,
) -> Tensor:
    """`block(queries, *whole, *by_query)` over blocks of queries; several are recomputed in the backward pass."""
    tokens = q_BTHC.shape[1]
    step = max(1, BLOCK_BUDGET // per_query)
    if tokens <= step:
        return block(q_BTHC, *whole, *by_query)
    outs = []
    for i in range(0, tokens, step):
        inputs = (q_BTHC[:, i : i + step], *whole, *(x[:, i : i + step] for x in by_query))
        outs.append(checkpoint(block, *inputs, use_reentrant=False) if torch.is_grad_enabled() else block(*inputs))
    return torch.cat(outs, dim=1)
