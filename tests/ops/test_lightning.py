"""The fused indexer against `reference.index_scores` and `reference.select`, in every instruction set at hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.ops import lightning, reference

pytestmark = pytest.mark.skipif(not lightning.available(), reason="the install found no C compiler")
VARIANTS = range(lightning.variants() if lightning.available() else 0)


def inputs(tokens: int, keys: int, heads: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, heads, width, generator=g),
        torch.randn(keys, width, generator=g),
        torch.randn(tokens, heads, generator=g),
    )


def whole_numbers(tokens: int, keys: int, heads: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Values whose sums fp32 holds exactly, so that every order of addition agrees and ties are true ties."""
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, width), (keys, width), (tokens, heads)
    q, k, w = (torch.randint(-2, 3, shape, generator=g).float() for shape in shapes)
    return q, k, w


def causal(tokens: int, keys: int) -> tuple[Tensor, Tensor]:
    hi_T = torch.arange(keys - tokens, keys) + 1
    return torch.zeros_like(hi_T), hi_T


def truth(q_THI: Tensor, k_SI: Tensor, w_TH: Tensor, lo_T: Tensor, hi_T: Tensor, k: int) -> Tensor:
    scores_BTS = reference.index_scores(q_THI[None], k_SI[None], w_TH[None])
    return reference.select(scores_BTS, lo_T[None], hi_T[None], k)[0]


def assert_near(q_THI: Tensor, k_SI: Tensor, w_TH: Tensor, lo_T: Tensor, hi_T: Tensor, k: int, got_TK: Tensor) -> None:
    """Equal to the selection in fp64, but for keys whose scores stand within rounding of the k-th."""
    wide = q_THI.double(), k_SI.double(), w_TH.double()
    want_TK = truth(*wide, lo_T, hi_T, k)
    scores_TS = reference.index_scores(*(x[None] for x in wide))[0]
    for t in (got_TK != want_TK).any(1).nonzero()[:, 0].tolist():
        got, want = set(got_TK[t].tolist()), set(want_TK[t].tolist())
        kth = scores_TS[t, want_TK[t]].min()
        gap = (scores_TS[t, sorted(got ^ want)] - kth).abs().max()
        assert len(got) == len(want) == k and -1 not in got
        assert gap < 1e-5 * scores_TS[t].abs().max()
    assert (got_TK >= 0).sum() == (want_TK >= 0).sum()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("tokens", "keys", "heads", "width", "k"),
    [
        (70, 1000, 16, 32, 64),  # nano
        (20, 2500, 32, 128, 2048),  # the published width
        (33, 500, 3, 10, 20),  # tiles with rows of three queries
        (17, 333, 1, 256, 5),
        (9, 200, 128, 2, 1),
        (5, 40, 20, 6, 4096),  # k above the visible keys
        (1, 1, 1, 2, 1),
    ],
)
def test_equals_the_reference(tokens: int, keys: int, heads: int, width: int, k: int, variant: int) -> None:
    row = *inputs(tokens, keys, heads, width), *causal(tokens, keys)
    assert_near(*row, k, lightning.select(*row, k, variant=variant))


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ties_zeros_and_intervals_are_exact(variant: int, data: st.DataObject) -> None:
    tokens, keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 400))
    heads, width = data.draw(st.integers(1, 20)), 2 * data.draw(st.integers(1, 10))
    k, seed = data.draw(st.integers(1, 80)), data.draw(st.integers(0, 1000))
    edge = st.integers(-5, keys + 5)  # empty, reversed and overhanging intervals too
    lo_T = torch.tensor(data.draw(st.lists(edge, min_size=tokens, max_size=tokens)))
    hi_T = torch.tensor(data.draw(st.lists(edge, min_size=tokens, max_size=tokens)))
    row = *whole_numbers(tokens, keys, heads, width, seed), lo_T, hi_T
    assert torch.equal(lightning.select(*row, k, variant=variant), truth(*row, k))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", ["rising", "falling", "constant", "sawtooth"])
def test_long_rows_cut_the_candidates_many_times(order: str, variant: int) -> None:
    keys, k = 5003, 50
    s = torch.arange(keys, dtype=torch.float32)
    k_SI = {"rising": s, "falling": -s, "constant": s * 0, "sawtooth": s % 97}[order][:, None].repeat(1, 2)
    q_THI, w_TH = torch.tensor([[[0.5, 0.5], [-0.5, -0.5]]]), torch.tensor([[1.0, -1.0]])
    row = q_THI, k_SI, w_TH, torch.tensor([3]), torch.tensor([keys - 1])
    assert torch.equal(lightning.select(*row, k, variant=variant), truth(*row, k))


@pytest.mark.parametrize("variant", VARIANTS)
def test_minus_infinity_and_nan_are_never_chosen(variant: int) -> None:
    q_THI, k_SI, w_TH = inputs(1, 100, 1, 4)
    q_THI, w_TH = q_THI.abs(), -w_TH.abs()
    k_SI[10:90] = float("inf")  # scores of -inf
    k_SI[90:, 0] = float("nan")
    lo_T, hi_T = torch.tensor([0]), torch.tensor([100])
    chosen = lightning.select(q_THI, k_SI, w_TH, lo_T, hi_T, 40, variant=variant)[0]
    assert chosen.tolist() == [*range(10), *[-1] * 30]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("tokens", "heads"), [(37, 1), (37, 5), (37, 12), (37, 16), (7, 12)])
def test_threads_and_neighbours_do_not_matter(tokens: int, heads: int, variant: int) -> None:
    """Crowds of keys that differ in the last bits: another order of additions would choose others."""
    q_THI, k_SI, w_TH = inputs(tokens, 700, heads, 32)
    k_SI *= 1e-7
    k_SI += torch.randn(7, 32, generator=torch.Generator().manual_seed(1)).repeat(100, 1)
    lo_T, hi_T = causal(tokens, 700)
    row = q_THI, k_SI, w_TH, lo_T, hi_T
    threads = torch.get_num_threads()
    together = []
    try:
        for torch_threads in (1, 2, 3):
            torch.set_num_threads(torch_threads)
            together.append(lightning.select(*row, 31, variant=variant))
    finally:
        torch.set_num_threads(threads)
    alone = [
        lightning.select(q_THI[t : t + 1], k_SI, w_TH[t : t + 1], lo_T[t : t + 1], hi_T[t : t + 1], 31, variant=variant)
        for t in range(tokens)
    ]
    for other in (*together[1:], torch.cat(alone)):
        assert torch.equal(other, together[0])


def test_calls_of_bounded_work_join_to_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    row = *whole_numbers(150, 300, 4, 8), *causal(150, 300)
    monkeypatch.setattr(lightning, "CALL_BUDGET", 1)
    assert torch.equal(lightning.select(*row, 16), truth(*row, 16))


def test_empty_inputs() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert lightning.select(*inputs(0, 8, 2, 4), nothing, nothing, 3).shape == (0, 3)
    zeros = torch.zeros(2, dtype=torch.int64)
    assert lightning.select(*inputs(2, 0, 2, 4), zeros, zeros, 3).tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize("fault", ["dtype", "shape", "stride", "interval", "k", "variant"])
def test_refuses_memory_that_it_would_misread(fault: str) -> None:
    q_THI, k_SI, w_TH = inputs(4, 16, 2, 4)
    lo_T, hi_T = causal(4, 16)
    k, variant = 3, 0
    if fault == "dtype":
        k_SI = k_SI.double()
    elif fault == "shape":
        w_TH = w_TH[:3]
    elif fault == "stride":
        k_SI = k_SI.T.contiguous().T
    elif fault == "interval":
        hi_T = hi_T.int()
    elif fault == "k":
        k = 0
    else:
        variant = 9
    with pytest.raises(ValueError):
        lightning.select(q_THI, k_SI, w_TH, lo_T, hi_T, k, variant=variant)
