"""Absorbed latent attention over selected rows of a pool, gathered inside the kernel: one read of each chosen row.

Softmax online over tiles of the selection (Milakov and Gimelshein, arXiv:1805.02867): a running maximum m, sum l and
weighted sum of values per head. Where there are too few queries to fill the GPU, a selection is cut into parts, whose
(m, l, values) a second kernel merges (as FlashDecoding does). `reference.sparse_attention` is the truth.

Left out: gradients (`ops/sparse_attention.py`), sharing rows among queries that chose the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5.ops.gpu.rows import load, operands, product, tile
from glm5.ops.gpu.stored import StoredRows

HEADS = 16
"""Of one tile: the least that tensor cores take, so that a few queries already fill many processors."""
FEWEST = 4
"""Tiles of rows that a part of a selection has at least."""
LOG2_E = 1.4426950408889634
"""Scores are scaled by it once, and powers are of 2."""


def attend_in_parts(
    q_THC: Tensor, latents: StoredRows, selected_TK: Tensor, value_width: int, scale: float, *, programs: int
) -> Tensor:
    """Attention [T, H, value_width] of queries over the slots that each selected; -1 anywhere selects nothing.

    q: fp32 or bf16, to which rows are rounded; scores, probabilities and sums are fp32. A query without any slot gives
    zeros. programs: how many the device runs at once; the order of sums depends on it and on T, never on the values.
    """
    tokens, heads, width = q_THC.shape
    selection = selected_TK.shape[1]
    launch = tiles(q_THC.dtype, heads, width, value_width, latents.groups)
    rows, head_tiles = launch["ROWS"], triton.cdiv(heads, HEADS)
    parts = min(triton.cdiv(programs, tokens * head_tiles), triton.cdiv(selection, rows * FEWEST))
    part = triton.cdiv(triton.cdiv(selection, max(1, parts)), rows) * rows
    parts = max(1, triton.cdiv(selection, max(1, part)))
    out_THV = q_THC.new_empty(tokens, heads, value_width)
    values_TPHV = out_THV if parts == 1 else q_THC.new_empty(tokens, parts, heads, value_width, dtype=torch.float32)
    sums_TPH2 = q_THC.new_empty(tokens, parts, heads, 2, dtype=torch.float32)
    _attend[(tokens, head_tiles, parts)](
        q_THC.contiguous(), latents.rows_XW, latents.scales, selected_TK.contiguous(), values_TPHV, sums_TPH2,
        scale * LOG2_E, selection, part, parts, WHOLE=parts == 1, **launch,
    )  # fmt: skip
    if parts > 1:
        merged = {name: launch[name] for name in ("HEADS", "VALUES", "VALUE_TILE", "enable_fp_fusion")}
        _merge[(tokens, heads)](values_TPHV, sums_TPH2, out_THV, parts, **merged)
    return out_THV


def tiles(dtype: torch.dtype, heads: int, width: int, value_width: int, groups: int) -> dict[str, Any]:
    """How `_attend` is compiled. Its tiles, those on their way too, fit into 99 KB: the shared memory of any GPU."""
    value_tile = tile(value_width)
    return {
        "HEADS": heads, "WIDTH": width, "VALUES": value_width, "VALUE_TILE": value_tile,
        "ROTARY_TILE": tile(width - value_width), "HEAD_TILE": HEADS, "ROWS": 16 if dtype == torch.float32 else 32,
        "GROUPS": groups, "DTYPE": operands(dtype), "num_warps": 8 if value_tile > 128 else 4, "enable_fp_fusion": True,
    }  # fmt: skip


@triton.jit(do_not_specialize=["selection", "part", "parts"])
def _attend(
    q, rows, scales, selected, values, sums, scale, selection, part, parts,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, VALUE_TILE: tl.constexpr, ROTARY_TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Some heads of one query over a part of its selection: normalised values where it is WHOLE, else (m, l) beside."""
    ROTARY: tl.constexpr = WIDTH - VALUES
    t, piece = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    value, rotary = tl.arange(0, VALUE_TILE), tl.arange(0, ROTARY_TILE)
    real = head < HEADS
    row = q + (t * HEADS + head[:, None]) * WIDTH
    q_value = tl.load(row + value[None, :], mask=real[:, None] & (value < VALUES)[None, :], other=0).to(DTYPE)
    q_rotary = tl.load(row + VALUES + rotary[None, :], mask=real[:, None] & (rotary < ROTARY)[None, :], other=0)
    q_rotary = q_rotary.to(DTYPE)
    m = tl.full((HEAD_TILE,), float("-inf"), dtype=tl.float32)
    l = tl.zeros((HEAD_TILE,), dtype=tl.float32)
    total = tl.zeros((HEAD_TILE, VALUE_TILE), dtype=tl.float32)
    for start in range(piece * part, min((piece + 1) * part, selection), ROWS):
        k = start + tl.arange(0, ROWS)
        slots = tl.load(selected + t * selection + k, mask=k < selection, other=-1)
        chosen = slots >= 0
        key_value = load(rows, scales, slots, chosen, WIDTH, 0, VALUES, VALUE_TILE, GROUPS, DTYPE)
        key_rotary = load(rows, scales, slots, chosen, WIDTH, VALUES, ROTARY, ROTARY_TILE, GROUPS, DTYPE)
        dots = product(q_value, tl.trans(key_value)) + product(q_rotary, tl.trans(key_rotary))
        dots = tl.where(chosen[None, :], dots * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(dots, axis=1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing chosen so far: -inf less -inf would be NaN
        p = tl.exp2(dots - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, axis=1)
        total = total * shrink[:, None] + product(p.to(DTYPE), key_value)
        m = m_new
    at = (t * parts + piece) * HEADS + head
    if WHOLE:
        total = total / tl.where(l == 0.0, 1.0, l)[:, None]
    else:
        tl.store(sums + at * 2, m, mask=real)
        tl.store(sums + at * 2 + 1, l, mask=real)
    mask = real[:, None] & (value < VALUES)[None, :]
    tl.store(values + at[:, None] * VALUES + value[None, :], total.to(values.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts"])
def _merge(values, sums, out, parts, HEADS: tl.constexpr, VALUES: tl.constexpr, VALUE_TILE: tl.constexpr):
    """One head of one query: its parts, one after another."""
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    value = tl.arange(0, VALUE_TILE)
    m, l = float("-inf"), 0.0
    total = tl.zeros((VALUE_TILE,), dtype=tl.float32)
    for piece in range(parts):
        at = (t * parts + piece) * HEADS + head
        m_part, l_part = tl.load(sums + at * 2), tl.load(sums + at * 2 + 1)
        m_new = tl.maximum(m, m_part)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        old, new = tl.exp2(m - base), tl.exp2(m_part - base)
        l = l * old + l_part * new
        total = total * old + new * tl.load(values + at * VALUES + value, mask=value < VALUES, other=0.0)
        m = m_new
    total = total / tl.where(l == 0.0, 1.0, l)
    tl.store(out + (t * HEADS + head) * VALUES + value, total.to(out.dtype.element_ty), mask=value < VALUES)
