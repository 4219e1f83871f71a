"""The lightning indexer's selection as one fused pass on a CPU: the caller of the optional C extension.

PyTorch's operators write every [head, query, key] product to memory and read it back for the ReLU, for the weighted
head sum and for top-k; `csrc/lightning.c` keeps them in registers (`python -m benchmarks.indexer` measures both). The
truth is `reference.index_scores` followed by `reference.select`; scores differ from it by fp32 rounding only, and a
query's selection depends neither on the number of threads nor on the other queries of the call. NaN scores, which the
reference leaves undefined, are never chosen.

Where the install found no C compiler `available()` is False and `selection.py` takes the path of PyTorch operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from glm5.ops import _lightning
except ImportError:
    _lightning = None  # type: ignore[assignment]

FEW_QUERIES = 16
"""Up to this many queries (decoding) a packed copy of the keys costs more than it saves."""
CALL_BUDGET = 1 << 36
"""Multiply-adds per call of the extension, about a second of one core: Ctrl-C is heard between calls."""


def available() -> bool:
    """True when the extension was built by the install."""
    return _lightning is not None


def variants() -> int:
    """How many instruction sets this processor and the extension share; variant 0 has the widest vectors."""
    return _lightning.variants()


def select(
    q_THI: Tensor, k_SI: Tensor, w_TH: Tensor, lo_T: Tensor, hi_T: Tensor, k: int, *, variant: int = 0
) -> Tensor:
    """Positions [T, K] (int64) of the k best keys in `[lo, hi)` of every query, ascending, -1 padded.

    q, k_SI, w: fp32, contiguous, on the CPU. lo, hi: int64. The lowest position wins a tie. Runs on
    `torch.get_num_threads()` threads; beside its result it needs one copy of the keys (none for a few queries) and
    about 16 k bytes per thread and query in flight. Raises ValueError for tensors of other types or shapes.
    """
    tokens, heads, width = q_THI.shape
    keys = k_SI.shape[0]
    _require("q_THI", q_THI, torch.float32, (tokens, heads, width))
    _require("k_SI", k_SI, torch.float32, (keys, width))
    _require("w_TH", w_TH, torch.float32, (tokens, heads))
    _require("lo_T", lo_T, torch.int64, (tokens,))
    _require("hi_T", hi_T, torch.int64, (tokens,))
    if k < 1 or heads < 1 or width < 1 or keys >= 2**31:
        raise ValueError(f"cannot select {k} of {keys} keys by {heads} heads of width {width}")
    chosen_TK = torch.full((tokens, k), -1)
    if not tokens or not keys:
        return chosen_TK
    panels = None
    if tokens > FEW_QUERIES:
        panels = torch.empty(-(-keys // _lightning.PANEL) * _lightning.PANEL * width)
        _lightning.pack(k_SI.data_ptr(), panels.data_ptr(), keys, width)
    threads = torch.get_num_threads()
    step = max(16 * threads, CALL_BUDGET // (keys * heads * width))
    starts = (q_THI, 4 * heads * width), (w_TH, 4 * heads), (lo_T, 8), (hi_T, 8), (chosen_TK, 8 * k)  # bytes a query
    for first in range(0, tokens, step):
        q, w, lo, hi, chosen = (x.data_ptr() + first * size for x, size in starts)
        copy = 0 if panels is None else panels.data_ptr()
        count = min(step, tokens - first)
        _lightning.select(q, k_SI.data_ptr(), copy, w, lo, hi, chosen, count, keys, heads, width, k, threads, variant)
    return chosen_TK


def _require(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The extension reads raw memory: nothing but the exact layout may pass."""
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(
            f"{name} must be a contiguous CPU tensor of {dtype} and shape {shape}, "
            f"not {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        )
