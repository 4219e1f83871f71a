"""The sieve before the indexer's scores changes no choice: against the plain pass of the same processor, to the bit."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.ops import decoding
from glm5.ops.decoding import Matrix, Sequences, Stored

if not decoding.available():
    pytest.skip("the install found no C compiler", allow_module_level=True)

from glm5.ops import _lightning

if _lightning.variants() < 4:
    pytest.skip("this processor has no products in bf16 (AVX512_BF16)", allow_module_level=True)

SIFTED, PLAIN = 0, 1


def choose(q_THI: Tensor, w_TH: Tensor, pool_XI: Tensor, where: Sequences, k: int, variant: int) -> Tensor:
    at_TK = torch.full((len(w_TH), k), -7)
    matrices = Matrix.of(at_TK), Matrix.of(q_THI), Matrix.of(w_TH), Stored.of(pool_XI)
    decoding.select(*matrices, where, variant=variant)
    return at_TK


def both(q_THI: Tensor, w_TH: Tensor, pool_XI: Tensor, k: int, page: int = 16) -> tuple[Tensor, Tensor]:
    """The choices among all rows of a pool in shuffled blocks, through the sieve and without."""
    order = torch.randperm(len(pool_XI) // page, generator=torch.Generator().manual_seed(3))
    table = array("q", order.tolist())
    where = Sequences(array("q", [*table.buffer_info(), len(pool_XI) // page * page - 1] * len(w_TH)), page)
    sifted, plain = (choose(q_THI, w_TH, pool_XI, where, k, variant) for variant in (SIFTED, PLAIN))
    return sifted, plain


def inputs(keys: int, heads: int, width: int, seed: int, tokens: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, width), (tokens, heads), (keys, width)
    q, w, pool = (torch.randn(shape, generator=g) for shape in shapes)
    return q, w, pool


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_signs_and_magnitudes(data: st.DataObject) -> None:
    heads, width, page = data.draw(st.integers(1, 33)), data.draw(st.integers(1, 140)), data.draw(st.integers(1, 70))
    keys, k, seed = data.draw(st.integers(page, 3000)), data.draw(st.integers(1, 90)), data.draw(st.integers(0, 999))
    q, w, pool = inputs(keys, heads, width, seed)
    signs = data.draw(st.sampled_from(["mixed", "positive", "negative", "one positive"]))
    if signs != "mixed":
        w = w.abs() if signs == "positive" else -w.abs()
    if signs == "one positive":
        w[:, heads // 2] = 10
    # The scales of q and w undo each other, or the scores leave fp32
    scale = 2.0 ** data.draw(st.integers(-120, 120))
    sifted, plain = both(q * scale, w, pool * 2.0 ** data.draw(st.integers(-120, 120)), k, page)
    assert torch.equal(sifted, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("crowd", [1e-2, 1e-4, 1e-7])
def test_crowds_of_keys_that_bf16_cannot_tell_apart(crowd: float, dtype: torch.dtype) -> None:
    q, w, pool = inputs(4000, 16, 32, seed=1)
    pool = (pool[:5].repeat(800, 1) + crowd * pool).to(dtype)
    sifted, plain = both(q, w, pool, 40)
    assert torch.equal(sifted, plain)
    assert torch.equal(sifted, both(q, w, pool.float(), 40)[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-38, 1e-44, 0.0])
@pytest.mark.parametrize("place", ["q", "w", "key", "keys", "head"])
def test_what_bf16_cannot_hold(place: str, value: float) -> None:
    q, w, pool = inputs(2000, 6, 20, seed=2)
    if place == "q":
        q[0, 2, 3] = value
    elif place == "w":
        w[0, 1] = value
    elif place == "key":
        pool[::7, 5] = value
    elif place == "keys":
        pool *= value if value == value else 1
    else:
        q[:, 4] = value
    sifted, plain = both(q, w, pool, 30)
    assert torch.equal(sifted, plain)


def test_sums_that_leave_fp32_on_one_of_the_two_ways() -> None:
    """Products near the largest float: rounded to bf16 they may overflow where the fp32 sums do not, and back."""
    q, w, pool = inputs(3000, 4, 8, seed=4)
    for exponent in (124, 125, 126, 127):
        for sign in (1, -1):
            sifted, plain = both(q * 2.0 ** (exponent - 63), sign * w.abs(), pool * 2.0**63, 25)
            assert torch.equal(sifted, plain)
