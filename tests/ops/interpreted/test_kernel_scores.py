"""Scores and choice of the indexer's kernels against `reference`, over keys scattered through a pool."""

from __future__ import annotations

import pytest
import torch
from stored import FORMATS, filled, normal, read, stored, uneven
from torch import Tensor

from glm5.engine.pool import Pool, Storage
from glm5.ops import reference
from glm5.ops.gpu import paged
from glm5.ops.gpu.scores import prompt_scores, scores
from glm5.ops.gpu.stored import Places


def whole(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: every order of addition agrees, and ties are true ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def scattered(sequences: int, blocks: int, page: int, of: list[int], lo: list[int], hi: list[int]) -> Places:
    """Sequences with blocks of their own, in no order."""
    order = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(page))
    number = lambda values: torch.tensor(values, dtype=torch.int64)
    return Places(order.view(sequences, blocks), page, number(of), number(lo), number(hi), max(hi))


def truth(q_THI: Tensor, w_TH: Tensor, pool: Pool, places: Places) -> Tensor:
    """Scores [T, longest], one query after another."""
    rows, values = [], read(pool)
    at_S = torch.arange(places.longest)
    for q_HI, w_H, sequence, lo, hi in zip(q_THI, w_TH, places.sequence_T, places.lo_T, places.hi_T, strict=True):
        slots_S = places.tables_RB[sequence][at_S // places.page] * places.page + at_S % places.page
        row_S = reference.index_scores(q_HI.float()[None, None], values[slots_S][None], w_H[None, None])[0, 0]
        rows.append(row_S.masked_fill((at_S < lo) | (at_S >= hi), float("-inf")))
    return torch.stack(rows)


def assert_scores(got_TS: Tensor, wanted_TS: Tensor) -> None:
    """Equal up to the order of sums; nothing but -inf beyond the last key."""
    keys = wanted_TS.shape[1]
    assert bool((got_TS[:, keys:] == float("-inf")).all())
    torch.testing.assert_close(got_TS[:, :keys], wanted_TS, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize(("heads", "width"), [(32, 128), (16, 32), (5, 72)], ids=["glm-5", "nano", "odd"])
def test_each_query_scores_the_keys_of_its_own_sequence(heads: int, width: int, storage: Storage, dtype: torch.dtype):
    page = 7
    places = scattered(3, 20, page, [2, 0, 0, 1, 2], [0, 0, 3, 0, 64], [130, 1, 63, 64, 129])
    pool = filled(uneven(3 * 20 * page, width, seed=1), storage)
    q_THI, w_TH = normal(5, heads, width, seed=3).to(dtype), normal(5, heads, seed=4)
    assert_scores(scores(q_THI, w_TH, stored(pool), places), truth(q_THI, w_TH, pool, places))


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize(("heads", "width"), [(32, 128), (3, 72)], ids=["glm-5", "odd"])
def test_queries_of_a_prompt_score_their_intervals(heads: int, width: int, storage: Storage):
    page, tokens = 16, 70
    lo = [0] * 40 + [40] * 30  # a second document from the 41st key on
    places = scattered(1, 13, page, [0] * tokens, lo, list(range(1 + 100, tokens + 101)))
    pool = filled(uneven(13 * page, width, seed=5), storage)
    q_THI, w_TH = normal(tokens, heads, width, seed=7), normal(tokens, heads, seed=8)
    assert_scores(prompt_scores(q_THI, w_TH, stored(pool), places), truth(q_THI, w_TH, pool, places))


@pytest.mark.parametrize("k", [1, 20, 150])
@pytest.mark.parametrize("storage", FORMATS)
def test_the_lowest_position_wins_a_tie(storage: Storage, k: int, monkeypatch: pytest.MonkeyPatch):
    """Among few values nearly every choice is a tie. Whole numbers are exact in every format."""
    page = 16
    hi = [1, 19, 20, 21, 100, 140]
    places = scattered(6, 10, page, [0, 1, 2, 3, 4, 5], [0] * 6, hi)
    pool = filled(whole(6 * 10 * page, 6, seed=9), storage)
    q_THI, w_TH = whole(6, 5, 6, seed=10), whole(6, 5, seed=11)
    wanted_TK = reference.select(truth(q_THI, w_TH, pool, places)[None], places.lo_T[None], places.hi_T[None], k)[0]
    assert torch.equal(paged.select(q_THI, w_TH, stored(pool), places, k), wanted_TK)
    monkeypatch.setattr(paged, "SCORES", 2 * places.longest)  # two queries at a time
    assert torch.equal(paged.select(q_THI, w_TH, stored(pool), places, k), wanted_TK)


def test_a_long_prompt_chooses_as_its_tokens_would_alone(monkeypatch: pytest.MonkeyPatch):
    page, tokens = 16, 40
    places = scattered(1, 5, page, [0] * tokens, [0] * tokens, list(range(31, 31 + tokens)))
    pool = filled(whole(5 * page, 6, seed=12), "fp32")
    q_THI, w_TH = whole(tokens, 5, 6, seed=13), whole(tokens, 5, seed=14)
    asked = []
    monkeypatch.setattr(paged, "prompt_scores", lambda *of: asked.append(len(of[0])) or prompt_scores(*of))
    monkeypatch.setattr(paged, "SCORES", 15 * places.longest)
    chosen_TK = paged.select(q_THI, w_TH, stored(pool), places, 9)
    assert asked == [15, 15, 10]  # of the whole prompt no matrix of scores lives
    wanted_TK = reference.select(truth(q_THI, w_TH, pool, places)[None], places.lo_T[None], places.hi_T[None], 9)[0]
    assert torch.equal(chosen_TK, wanted_TK)


@pytest.mark.parametrize("storage", FORMATS)
def test_a_key_that_is_no_number_is_never_chosen(storage: Storage):
    places = scattered(1, 2, 16, [0, 0], [0, 0], [30, 30])
    rows_XI = normal(32, 16, seed=15)
    bad = [4, 17]
    rows_XI[places.tables_RB[0, [0, 1]] * 16 + torch.tensor([4, 1])] = float("nan")
    # All positive and no padded column: infinities in its place would be the largest of all.
    q_THI, w_TH = normal(2, 16, 16, seed=16).abs(), normal(2, 16, seed=17).abs()
    chosen_TK = paged.select(q_THI, w_TH, stored(filled(rows_XI, storage)), places, 29)
    assert [at for at in range(30) if at not in bad] == chosen_TK[0, :28].tolist() and int(chosen_TK[0, 28]) == -1


def test_slots_are_those_of_the_block_tables():
    places = Places(torch.tensor([[3, 0], [1, 2]]), 4, torch.tensor([1, 0]), *torch.tensor([[0, 0], [8, 5]]), 8)
    slots_TK = places.slots(torch.tensor([[0, 3, 7], [4, -1, -1]]))
    assert slots_TK.tolist() == [[4, 7, 11], [0, -1, -1]]
