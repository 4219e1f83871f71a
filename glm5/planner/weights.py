"""Bytes of weights, part by part, in the three storage formats.

`bf16`: two bytes each. `fp8`: e4m3 with one FP32 scale per block of 128 x 128 for the weights that the published FP8
checkpoints quantise, BF16 for the rest. `int4`: routed experts in 4 bits with a BF16 scale and zero per 64 inputs (4.5
bits each), everything else linear, and both vocabulary tables, in 8 bits with one FP32 scale per row. Router biases are
FP32 in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from glm5.errors import InputError, did_you_mean
from glm5.planner.quantity import Quantity, derive
from glm5.planner.shape import ModelShape, Tensor

Dtype = Literal["bf16", "fp8", "int4"]
CacheDtype = Literal["bf16", "fp8"]
_BLOCK, _GROUP = 128, 64


def check_dtype(name: str, kinds: object = Dtype, what: str = "dtype") -> str:
    """`name` when it is one of `kinds`, otherwise an `InputError` with the nearest one."""
    known = get_args(kinds)
    if name not in known:
        raise InputError(f"{what} {name!r} is not one of {', '.join(known)}.{did_you_mean(name, known)}")
    return name


@dataclass(frozen=True)
class Stored:
    """How one tensor is stored: values of one width, and four-byte scales beside them."""

    bytes_each: float
    scales: int

    def bytes(self, values: int) -> float:
        """Of `values` weights and their scales."""
        return values * self.bytes_each + 4 * self.scales


def stored(t: Tensor, dtype: str) -> Stored:
    """The format of `t` under `dtype`; a group's BF16 scale and zero count as one four-byte scale."""
    if t.storage == "fp32":
        return Stored(4, 0)
    if dtype == "fp8" and t.storage in ("linear", "expert"):
        return Stored(1, ceil(t.rows / _BLOCK) * ceil(t.columns / _BLOCK) * t.copies)
    if dtype == "int4" and t.storage == "expert":
        return Stored(0.5, t.rows * ceil(t.columns / _GROUP) * t.copies)
    if dtype == "int4" and t.storage in ("linear", "table"):
        return Stored(1, t.rows * t.copies)
    return Stored(2, 0)


def tensor_bytes(tensors: Iterable[Tensor], dtype: str) -> float:
    """Bytes of all of them."""
    return sum(stored(t, dtype).bytes(t.parameters) for t in tensors)


def part_bytes(shape: ModelShape, dtype: str, *, mtp: bool) -> tuple[Quantity, ...]:
    """One quantity per part of the model, then the MTP layer as one part when `mtp`."""
    groups: dict[str, list[Tensor]] = {}
    for t in shape.tensors:
        if mtp or not t.mtp:
            groups.setdefault("MTP layer" if t.mtp else t.part, []).append(t)
    return tuple(_part(name, tensors, dtype) for name, tensors in groups.items())


def _part(name: str, tensors: list[Tensor], dtype: str) -> Quantity:
    """The sum over the part's formats, with only the terms that occur."""
    names = {0.5: "weights_int4", 1: "weights_8bit", 2: "weights_bf16", 4: "weights_fp32"}
    counts: dict[float, int] = {}
    scales = 0
    for t in tensors:
        form = stored(t, dtype)
        counts[form.bytes_each] = counts.get(form.bytes_each, 0) + t.parameters
        scales += form.scales
    terms = [f"{names[width]} * {width:g}" for width in sorted(counts)] + (["scales * 4"] if scales else [])
    inputs: dict[str, float | Quantity] = {names[width]: count for width, count in counts.items()}
    if scales:
        inputs["scales"] = scales
    return derive(name, "B", " + ".join(terms), inputs)


@dataclass(frozen=True)
class Shares:
    """A sum over tensors by how they are cut: a copy everywhere, over one replica, over all devices."""

    copied: float
    tensor: float
    all: float


def byte_shares(tensors: Iterable[Tensor], dtype: str) -> Shares:
    """Bytes by how they are cut over devices."""
    sums = dict.fromkeys(("none", "tensor", "all"), 0.0)
    for t in tensors:
        sums[t.split] += stored(t, dtype).bytes(t.parameters)
    return Shares(sums["none"], sums["tensor"], sums["all"])


def parameter_shares(tensors: Iterable[Tensor]) -> Shares:
    """Weights by how they are cut over devices."""
    sums = dict.fromkeys(("none", "tensor", "all"), 0.0)
    for t in tensors:
        sums[t.split] += t.parameters
    return Shares(sums["none"], sums["tensor"], sums["all"])
