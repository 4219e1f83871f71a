"""Scores of the lightning indexer for queries whose keys lie in blocks of a pool: nothing of the context is copied.

    scores[t, s] = sum_h w[t, h] relu(q[t, h] . k[slot(s)]),   slot(s) = table[s // page] * page + s % page

(DeepSeek-V3.2 report, equation 1; `reference.index_scores` is the truth.) Keys that a query does not see score -inf.
Two forms: few queries, each of its own sequence, make the heads the rows of one product (decoding); many queries of one
sequence share each tile of keys, head after head (prompts). Choosing among the scores is `selection.top_positions`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5.ops.gpu.rows import load, operands, product, tile
from glm5.ops.gpu.stored import Places, StoredRows


def scores(q_THI: Tensor, w_TH: Tensor, keys: StoredRows, places: Places) -> Tensor:
    """Scores [T, S] in fp32; -inf for what a query does not see. Each query may be of another sequence.

    S: `places.longest`, rounded up to whole tiles. q: fp32 or bf16, to which keys are rounded; products and sums are
    fp32. w: fp32. Both contiguous.
    """
    tokens, heads, width = q_THI.shape
    launch = decode_tiles(q_THI.dtype, heads, width, keys.groups)
    tiles = triton.cdiv(places.longest, launch["KEYS"])
    out_TS = q_THI.new_empty(tokens, tiles * launch["KEYS"], dtype=torch.float32)
    _decode[(tokens, tiles)](
        q_THI, w_TH, keys.rows_XW, keys.scales, out_TS, places.tables_RB, places.sequence_T, places.lo_T, places.hi_T,
        places.tables_RB.shape[1], out_TS.shape[1], places.page, **launch,
    )  # fmt: skip
    return out_TS


def prompt_scores(q_THI: Tensor, w_TH: Tensor, keys: StoredRows, places: Places) -> Tensor:
    """`scores` for queries that are all of the first query's sequence."""
    tokens, heads, width = q_THI.shape
    launch = prompt_tiles(q_THI.dtype, heads, width, keys.groups)
    tiles = triton.cdiv(places.longest, launch["KEYS"])
    out_TS = q_THI.new_empty(tokens, tiles * launch["KEYS"], dtype=torch.float32)
    _prompt[(triton.cdiv(tokens, launch["QUERIES"]), tiles)](
        q_THI, w_TH, keys.rows_XW, keys.scales, out_TS, places.tables_RB, places.sequence_T, places.lo_T, places.hi_T,
        places.tables_RB.shape[1], out_TS.shape[1], places.page, tokens, **launch,
    )  # fmt: skip
    return out_TS


def decode_tiles(dtype: torch.dtype, heads: int, width: int, groups: int) -> dict[str, Any]:
    """How `_decode` is compiled. In fp32 larger tiles would not fit into registers."""
    keys, warps = (32, 8) if dtype == torch.float32 else (64, 4)
    return {
        "HEADS": heads, "HEAD_TILE": tile(heads), "WIDTH": width, "TILE": tile(width), "KEYS": keys, "GROUPS": groups,
        "DTYPE": operands(dtype), "num_warps": warps, "enable_fp_fusion": True,
    }  # fmt: skip


def prompt_tiles(dtype: torch.dtype, heads: int, width: int, groups: int) -> dict[str, Any]:
    """How `_prompt` is compiled."""
    queries, warps = (32, 8) if dtype == torch.float32 else (64, 4)
    return {
        "HEADS": heads, "WIDTH": width, "TILE": tile(width), "QUERIES": queries, "KEYS": 64, "GROUPS": groups,
        "DTYPE": operands(dtype), "num_warps": warps, "enable_fp_fusion": True,
    }  # fmt: skip


@triton.jit
def _slots(tables, sequence, blocks, page, s, seen):
    """Slots of the positions s of a sequence."""
    block = tl.load(tables + sequence * blocks + s // page, mask=seen, other=0).to(tl.int64)
    return block * page + s % page


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _visible(score, seen):
    """-inf for what is not seen, and for NaN, which is never chosen."""
    return tl.where(seen & (score == score), score, float("-inf"))


@triton.jit(do_not_specialize=["blocks"])
def _decode(
    q, w, rows, scales, out, tables, sequences, lo, hi, blocks, length, page,
    HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    GROUPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One query against one tile of its keys."""
    t = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    seen = (s >= tl.load(lo + t)) & (s < tl.load(hi + t))
    slots = _slots(tables, tl.load(sequences + t).to(tl.int64), blocks, page, s, seen)
    key = load(rows, scales, slots, seen, WIDTH, 0, WIDTH, TILE, GROUPS, DTYPE)
    head, column = tl.arange(0, HEAD_TILE), tl.arange(0, TILE)
    known = (head < HEADS)[:, None] & (column < WIDTH)[None, :]
    query = tl.load(q + (t * HEADS + head[:, None]) * WIDTH + column[None, :], mask=known, other=0).to(DTYPE)
    weight = tl.load(w + t * HEADS + head, mask=head < HEADS, other=0.0)
    dots = _relu(product(query, tl.trans(key)))
    score = tl.sum(dots * weight[:, None], axis=0)
    tl.store(out + t * length + s, _visible(score, seen))


@triton.jit(do_not_specialize=["blocks", "tokens"])
def _prompt(
    q, w, rows, scales, out, tables, sequences, lo, hi, blocks, length, page, tokens,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    GROUPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of queries against a tile of keys, of which each query sees its own interval."""
    t = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    s = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    real = t < tokens
    first, last = tl.load(lo + t, mask=real, other=length), tl.load(hi + t, mask=real, other=0)
    any_seen = (s >= tl.min(first, axis=0)) & (s < tl.max(last, axis=0))
    score = tl.zeros((QUERIES, KEYS), dtype=tl.float32)
    if tl.max(any_seen.to(tl.int32), axis=0) > 0:  # else the tile lies beyond what any of the queries sees
        slots = _slots(tables, tl.load(sequences).to(tl.int64), blocks, page, s, any_seen)
        key = tl.trans(load(rows, scales, slots, any_seen, WIDTH, 0, WIDTH, TILE, GROUPS, DTYPE))
        column = tl.arange(0, TILE)
        known = real[:, None] & (column < WIDTH)[None, :]
        for head in range(HEADS):
            at = t * HEADS + head
            query = tl.load(q + at[:, None] * WIDTH + column[None, :], mask=known, other=0).to(DTYPE)
            weight = tl.load(w + at, mask=real, other=0.0)
            score += _relu(product(query, key)) * weight[:, None]
    seen = (s[None, :] >= first[:, None]) & (s[None, :] < last[:, None])
    at = t[:, None] * length + s[None, :]
    tl.store(out + at, _visible(score, seen), mask=real[:, None])
