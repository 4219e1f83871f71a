"""Single rows through the parts of a layer, without PyTorch's operators: the caller of the optional C extension.

A decode step of a small model is bound by the start of some 500 operators a layer; these functions start in a fraction
of a microsecond and read weights and caches where they lie, so nothing derived from a weight can be out of date. All
are fp32, on one core, without gradients; `tests/ops/test_decoding.py` compares each with PyTorch's operators and with
`reference.py`. Where the install found no C compiler `available()` is False and decoding takes the modules' own path.

Matrices are addresses with sizes. The extension refuses sizes that do not fit together, but it cannot know whether an
address is still alive: whoever makes a `Matrix` keeps its tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

try:
    from glm5.ops import _decoding, _lightning
except ImportError:
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


_EVERYTHING = torch.tensor([0, 2**62])
"""The interval of a query that sees every key there is."""


def select(chosen: int, q: Matrix, keys: Matrix, w: Matrix, k: int) -> None:
    """The lightning indexer's choice among all keys for one query [H, I]: k positions (int64) at an address."""
    lo = _EVERYTHING.data_ptr()
    sizes = 1, keys.rows, q.rows, keys.columns, k, 1, 0
    _lightning.select(q.address, keys.address, 0, w.address, lo, lo + 8, chosen, *sizes)


if _decoding is not None:
    copy, rms_norm, layer_norm = _decoding.copy, _decoding.rms_norm, _decoding.layer_norm
    linear, swiglu, rotate = _decoding.linear, _decoding.swiglu, _decoding.rotate
    combine_heads, split_heads = _decoding.combine_heads, _decoding.split_heads
    attend, route, experts = _decoding.attend, _decoding.route, _decoding.experts
