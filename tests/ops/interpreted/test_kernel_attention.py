"""Attention of the kernel over selected slots against `reference`, whole and in parts that are merged."""

from __future__ import annotations

import pytest
import torch
from stored import FORMATS, filled, normal, read, stored, uneven
from torch import Tensor

from glm5.engine.pool import Pool, Storage
from glm5.ops import reference
from glm5.ops.gpu import paged
from glm5.ops.gpu.attention import attend_in_parts

SHAPES = {"glm-5": (64, 576, 512), "nano": (4, 80, 64), "odd": (20, 20, 16)}
"""Heads, width of a latent row, width of its values."""


def chosen(tokens: int, selected: int, slots: int, seed: int) -> Tensor:
    """Different slots for each query."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(slots, generator=g)[:selected] for _ in range(tokens)])


def truth(q_THC: Tensor, pool: Pool, selected_TK: Tensor, value_width: int, scale: float) -> Tensor:
    """One query after another, over the rows that it selected and no others."""
    rows_XC, outs = read(pool), []
    for q_HC, selected_K in zip(q_THC.float(), selected_TK, strict=True):
        rows_KC = rows_XC[selected_K[selected_K >= 0]]
        every = torch.arange(len(rows_KC))[None, None]
        outs.append(reference.sparse_attention(q_HC[None, None], rows_KC[None], every, value_width, scale)[0, 0])
    return torch.stack(outs)


@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "in parts"])
@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attends_to_the_selected_rows(shape: str, storage: Storage, programs: int):
    heads, width, values = SHAPES[shape]
    tokens, selected = (1, 107) if shape == "glm-5" else (2, 139)  # whole tiles, and a part of one
    pool = filled(uneven(250, width, seed=1), storage)
    selected_TK = chosen(tokens, selected, 250, seed=3)
    selected_TK[-1, 5:9] = -1
    selected_TK[-1, -20:-1] = -1
    q_THC = normal(tokens, heads, width, seed=4)
    got_THV = attend_in_parts(q_THC, stored(pool), selected_TK, values, width**-0.5, programs=programs)
    wanted_THV = truth(q_THC, pool, selected_TK, values, width**-0.5)
    torch.testing.assert_close(got_THV, wanted_THV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "in parts"])
@pytest.mark.parametrize("selected", [0, 1, 16, 64, 65])
def test_selections_of_every_length(selected: int, programs: int):
    """One row, one tile, a part of one; no row at all gives zeros. Rows that nobody selected may be no numbers."""
    rows_XC = normal(100, 80, seed=5)
    selected_TK = torch.cat((chosen(2, selected, 99, seed=6) + 1, torch.full((2, 140 - selected), -1)), dim=1)
    selected_TK[1, :3] = -1
    used = selected_TK[selected_TK >= 0].unique()
    unused = torch.ones(100, dtype=torch.bool)
    unused[used] = False
    rows_XC[unused] = float("nan")
    pool, q_THC = filled(rows_XC, "fp32"), normal(2, 4, 80, seed=7)
    got_THV = attend_in_parts(q_THC, stored(pool), selected_TK, 64, 0.3, programs=programs)
    for t in range(2):
        wanted_THV = truth(q_THC[t : t + 1], pool, selected_TK[t : t + 1], 64, 0.3)
        torch.testing.assert_close(got_THV[t : t + 1], wanted_THV, rtol=1e-4, atol=1e-5)
    if selected == 0:
        assert bool((got_THV == 0).all())


@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "in parts"])
def test_large_scores_neither_overflow_nor_vanish(programs: int):
    """The largest stands in the last tile, so that every part before it shrinks to almost nothing."""
    pool = filled(normal(300, 80, seed=8), "fp32")
    q_THC = normal(1, 4, 80, seed=9) * 100
    order_K = (read(pool) @ q_THC[0, 0]).argsort()
    got_THV = attend_in_parts(q_THC, stored(pool), order_K[None], 64, 1.0, programs=programs)
    torch.testing.assert_close(got_THV, truth(q_THC, pool, order_K[None], 64, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", FORMATS)
def test_queries_in_bf16_give_bf16(storage: Storage):
    """The interpreter computes in fp32 and cuts off what bf16 cannot hold, where a GPU rounds."""
    pool = filled(uneven(120, 80, seed=10), storage)
    q_THC, selected_TK = normal(2, 4, 80, seed=11).bfloat16(), chosen(2, 77, 120, seed=12)
    got_THV = paged.attend(q_THC, stored(pool), selected_TK, 64, 80**-0.5)
    assert got_THV.dtype == torch.bfloat16
    torch.testing.assert_close(got_THV.float(), truth(q_THC, pool, selected_TK, 64, 80**-0.5), rtol=2**-7, atol=1e-3)


def test_kernels_start_where_the_tensors_are():
    with paged.on(torch.device("cpu")):
        pass
    assert paged.on(torch.device("cuda", 1)).idx == 1
