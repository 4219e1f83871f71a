"""Rows of a cache's pool, read inside a kernel where they lie, in each of the three formats of `glm5/engine/pool.py`.

fp8 goes by the bits, so that GPUs without fp8 arithmetic read it too: the bits of e4m3 moved into an fp16 are the value
times 2^-8 (its subnormal numbers stay exact), and a scale byte is the exponent of an fp32.

Trap: in Triton's interpreter a `tl.dot` of bf16 gives garbage without an error. There all operands are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SMALLEST = 16
"""Rows and columns of a tile at least: less than that no tensor core multiplies."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the import), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def tile(width: int) -> int:
    """Columns of a tile for rows of so many: a power of two."""
    return max(SMALLEST, triton.next_power_of_2(width))


def operands(dtype: torch.dtype) -> tl.dtype:
    """The dtype of products: that of the queries, to which rows are rounded as `Pool.read` would."""
    return tl.float32 if dtype == torch.float32 or interpreted() else tl.bfloat16


@triton.jit
def load(
    rows,
    scales,
    slots,
    known,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """COLUMNS columns from FIRST on of the rows at `slots` [N], as [N, TILE] of DTYPE; unknown rows are zeros.

    WIDTH: of a stored row. GROUPS: scale bytes of a row, 0 for none. Of fp8 a read starts at a group or stays in one.
    """
    column = tl.arange(0, TILE)
    mask = known[:, None] & (column < COLUMNS)[None, :]
    slots = slots.to(tl.int64)
    stored = tl.load(rows + slots[:, None] * WIDTH + FIRST + column[None, :], mask=mask, other=0)
    if GROUPS == 0:
        values = stored.to(DTYPE)
    else:
        HERE: tl.constexpr = (TILE + 63) // 64
        group = tl.arange(0, HERE) + FIRST // 64
        mask = known[:, None] & (group < GROUPS)[None, :]
        scale = tl.load(scales + slots[:, None] * GROUPS + group[None, :], mask=mask, other=127).to(tl.int32)
        power = tl.where(scale == 255, float("nan"), (scale << 23).to(tl.float32, bitcast=True))
        powers = tl.broadcast_to(power[:, :, None], (slots.shape[0], HERE, TILE // HERE))
        half = (stored.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4080
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        values = (value * tl.reshape(powers, (slots.shape[0], TILE))).to(DTYPE)
    return values


@triton.jit
def product(a, b):
    """a @ b in fp32: of fp32 without TF32, of bf16 with exact products."""
    return tl.dot(a, b, input_precision="ieee")
