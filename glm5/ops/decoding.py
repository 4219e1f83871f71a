"""A few rows through the parts of a layer, without PyTorch's operators: the caller of the optional C extension.

A decode step of a small model is bound by the start of some 500 operators a layer; these functions start in a fraction
of a microsecond and read weights and caches where they lie, so nothing derived from a weight can be out of date. All
are fp32, on one core (but for a long selection), without gradients; each computes a row by the same instructions in
whatever company, so a decoder's results do not depend on the batch. `tests/ops/test_decoding.py` compares each with
PyTorch's operators and with `reference.py`. Where the install found no C compiler, or built older sources,
`available()` is False and decoding takes the modules' own path.

Matrices are addresses with sizes. The extension refuses sizes that do not fit together, but it cannot know whether an
address is still alive: whoever makes a `Matrix` keeps its tensor.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from glm5.ops import _decoding, _lightning
except ImportError:
    _decoding = _lightning = None  # type: ignore[assignment]

INTERFACE = 3
GROUP = 64
"""Columns of an fp8 row that share a scale."""
if _decoding is not None and {getattr(x, "INTERFACE", 1) for x in (_decoding, _lightning)} != {INTERFACE}:
    _decoding = _lightning = None  # type: ignore[assignment]


def available() -> bool:
    """True when the extension was built by the install."""
    return _decoding is not None


class Matrix(NamedTuple):
    """Rows of 4-byte numbers in memory that a tensor elsewhere owns (of 8-byte ones where a function says int64)."""

    address: int
    rows: int
    columns: int
    stride: int
    """Numbers from one row to the next."""

    @classmethod
    def of(cls, tensor: Tensor) -> Matrix:
        """A contiguous CPU tensor; leading dimensions become rows, a vector becomes one row."""
        if (
            not tensor.is_contiguous()
            or tensor.device.type != "cpu"
            or tensor.dtype not in (torch.float32, torch.int64)
        ):
            raise ValueError(f"a matrix is contiguous fp32 or int64 on the CPU, not {tensor.dtype} on {tensor.device}")
        columns = tensor.shape[-1]
        return cls(tensor.data_ptr(), tensor.numel() // max(columns, 1), columns, columns)

    def cut(self, first: int, width: int) -> Matrix:
        """Some columns (fp32)."""
        assert first >= 0 and first + width <= self.columns
        return Matrix(self.address + 4 * first, self.rows, width, self.stride)

    def lines(self, first: int, count: int) -> Matrix:
        """Some rows (fp32)."""
        return Matrix(self.address + 4 * first * self.stride, count, self.columns, self.stride)

    def split(self, heads: int) -> Matrix:
        """Each row as `heads` rows; for rows without gaps."""
        assert self.stride == self.columns
        width = self.columns // heads
        return Matrix(self.address, self.rows * heads, width, width)


class Stored(NamedTuple):
    """Rows of a cache in memory that tensors elsewhere own: fp32, bf16, or fp8 as `glm5/engine/pool.py` keeps it."""

    address: int
    rows: int
    columns: int
    format: int
    """0 for fp32, 1 for bf16, 2 for fp8."""
    scales: int
    """Address of the scale bytes of fp8 [rows, groups], else 0."""

    @classmethod
    def of(cls, rows: Tensor, scales: Tensor | None = None) -> Stored:
        """Contiguous CPU tensors; leading dimensions become rows. Bytes come with their scales."""
        known = (torch.float32, torch.bfloat16, torch.uint8)
        for tensor in (rows,) if scales is None else (rows, scales):
            if not tensor.is_contiguous() or tensor.device.type != "cpu" or tensor.dtype not in known:
                raise ValueError(
                    f"a store is contiguous fp32, bf16 or bytes on the CPU, not {tensor.dtype} on {tensor.device}"
                )
        columns = rows.shape[-1]
        count = rows.numel() // max(columns, 1)
        if (rows.dtype == torch.uint8) != (scales is not None):
            raise ValueError("bytes need scales, and nothing else has any")
        if scales is not None and (scales.dtype != torch.uint8 or scales.shape != (count, -(-columns // GROUP))):
            raise ValueError(f"the scales of {count} rows of {columns} are no bytes of shape {tuple(scales.shape)}")
        return cls(rows.data_ptr(), count, columns, known.index(rows.dtype), 0 if scales is None else scales.data_ptr())


class Sequences(NamedTuple):
    """Where the keys of some queries lie, in blocks of a pool."""

    where: array[int]
    """For each query three 64-bit numbers: the address of its block table (int64), how many blocks, how many keys."""
    page: int
    """Slots per block."""


def select(
    chosen: Matrix,
    q: Matrix | None,
    w: Matrix | None,
    pool: Stored,
    sequences: Sequences,
    *,
    ask: Stored | None = None,
    variant: int = 0,
) -> None:
    """The lightning indexer's choice for queries [T * H, I], each among its own keys: slots (int64 [T, K]), -1 padded.

    Slots ascend by position, and the lowest position wins a tie. A query of at most K keys takes them all; if every
    query does, q and w (head weights [T, H]) may be left out. Long work runs on `torch.get_num_threads()` threads. The
    memory is asked for the chosen rows of the pool `ask`: they arrive while something else is computed.
    """
    tokens, where = chosen.rows, sequences.where
    if where.typecode != "q" or len(where) != 3 * tokens:
        raise ValueError(f"where must hold 3 numbers of 64 bits for each of {tokens} queries, not {len(where)}")
    heads = 1
    if q is not None and w is not None:
        heads = w.columns
        if (q.rows, q.columns, w.rows) != (tokens * heads, pool.columns, tokens) or q.stride != q.columns:
            raise ValueError("the indexer's queries and weights do not fit together")
    if chosen.stride != chosen.columns:
        raise ValueError("choices must be without gaps")
    queries = q.address if q else 0, w.address if w else 0
    if ask is not None and ask.rows < pool.rows:
        raise ValueError(f"the pool to ask for has {ask.rows} rows, fewer than the {pool.rows} to choose among")
    addresses = *queries, pool.address, pool.scales, where.buffer_info()[0], chosen.address, ask.address if ask else 0
    sizes = pool.format, tokens, pool.rows, sequences.page, heads, pool.columns, chosen.columns
    row_bytes = ask.columns * (4, 2, 1)[ask.format] if ask else 0
    _lightning.select_paged(*addresses, row_bytes, *sizes, torch.get_num_threads(), variant)


if _decoding is not None:
    copy, gather, scatter = _decoding.copy, _decoding.gather, _decoding.scatter
    rms_norm, layer_norm = _decoding.rms_norm, _decoding.layer_norm
    linear, swiglu, rotate = _decoding.linear, _decoding.swiglu, _decoding.rotate
    combine_heads, split_heads = _decoding.combine_heads, _decoding.split_heads
    attend, route, experts = _decoding.attend, _decoding.route, _decoding.experts
