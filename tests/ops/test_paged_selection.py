"""The choice among keys in blocks of a pool against `reference`, in every instruction set and with several threads."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from glm5.ops import decoding, lightning, reference
from glm5.ops.decoding import Matrix, Sequences, Stored

if not decoding.available():
    pytest.skip("the install found no C compiler", allow_module_level=True)

from glm5.ops import _lightning


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Paged:
    """Queries of whole numbers (every order of addition agrees, and ties are true ties) and the keys of each."""

    def __init__(self, lengths: list[int], *, page: int, heads: int = 5, width: int = 6, ordered: bool = False) -> None:
        g = torch.Generator().manual_seed(sum(lengths) + page)
        blocks = [-(-length // page) + 1 for length in lengths]
        self.pool_XI = torch.randint(-2, 3, (page * sum(blocks), width), generator=g).float()
        order = torch.arange(sum(blocks)) if ordered else torch.randperm(sum(blocks), generator=g)
        self.tables = [array("q", part.tolist()) for part in order.split(blocks)]
        self.lengths, self.page = lengths, page
        self.q_THI = torch.randint(-2, 3, (len(lengths), heads, width), generator=g).float()
        self.w_TH = torch.randint(-2, 3, (len(lengths), heads), generator=g).float()

    def slots(self, t: int) -> Tensor:
        blocks = torch.tensor(self.tables[t].tolist())
        return (blocks[:, None] * self.page + torch.arange(self.page)).flatten()[: self.lengths[t]]

    def sequences(self) -> Sequences:
        where = array("q")
        for table, length in zip(self.tables, self.lengths, strict=True):
            where.extend((*table.buffer_info(), length))
        return Sequences(where, self.page)

    def chosen(self, k: int, variant: int = 0) -> Tensor:
        at_TK = torch.full((len(self.lengths), k), -7)
        q, w = Matrix.of(self.q_THI), Matrix.of(self.w_TH)
        decoding.select(Matrix.of(at_TK), q, w, Stored.of(self.pool_XI), self.sequences(), variant=variant)
        return at_TK

    def truth(self, k: int) -> Tensor:
        rows = []
        for t in range(len(self.lengths)):
            slots_S = self.slots(t)
            keys_1SI, q_11HI, w_11H = self.pool_XI[slots_S][None], self.q_THI[t][None, None], self.w_TH[t][None, None]
            scores_11S = reference.index_scores(q_11HI, keys_1SI, w_11H)
            lo, hi = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), len(slots_S))
            at_K = reference.select(scores_11S, lo, hi, k)[0, 0]
            rows.append(torch.cat((slots_S, torch.tensor([-1])))[at_K])
        return torch.stack(rows)


@pytest.mark.parametrize("variant", range(_lightning.variants()))
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("page", [1, 7, 16, 64, 500])
def test_every_query_chooses_among_its_own_keys(page, ordered, variant):
    paged = Paged([1, 20, 21, 47, 48, 49, 300, 499], page=page, ordered=ordered)
    for k in (1, 20, 64):
        assert torch.equal(paged.chosen(k, variant), paged.truth(k))


@pytest.mark.parametrize("variant", range(_lightning.variants()))
@pytest.mark.parametrize("lengths", [[5000], [4999, 12, 700]])
def test_the_choice_does_not_depend_on_threads(lengths, variant, threads):
    """Long enough that the keys of a query are cut into parts."""
    paged = Paged(lengths, page=16, heads=32, width=32)
    wanted = paged.truth(50)
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        assert torch.equal(paged.chosen(50, variant), wanted)


@pytest.mark.parametrize("variant", range(_lightning.variants()))
def test_scores_are_those_of_the_packed_pass_to_the_bit(variant):
    """Crowds of keys that differ in the last bits: another order of additions would choose others."""
    paged = Paged([700], page=16, heads=16, width=32)
    g = torch.Generator().manual_seed(1)
    crowd = torch.randn(7, 32, generator=g).repeat(100, 1) + 1e-7 * torch.randn(700, 32, generator=g)
    paged.pool_XI[paged.slots(0)] = crowd
    paged.q_THI, paged.w_TH = torch.randn(1, 16, 32, generator=g), torch.randn(1, 16, generator=g)
    lo, hi = torch.zeros(20, dtype=torch.int64), torch.full((20,), 700)
    many = paged.q_THI.repeat(20, 1, 1), crowd, paged.w_TH.repeat(20, 1)
    packed_TK = lightning.select(*many, lo, hi, 31, variant=variant)
    assert torch.equal(paged.chosen(31, variant)[0], paged.slots(0)[packed_TK[0]])


def test_few_keys_are_all_chosen_whatever_they_score():
    paged = Paged([3, 8], page=4)
    paged.pool_XI.fill_(float("nan"))
    at_TK = torch.empty(2, 8, dtype=torch.int64)
    decoding.select(Matrix.of(at_TK), None, None, Stored.of(paged.pool_XI), paged.sequences())
    assert torch.equal(at_TK[1], paged.slots(1)) and at_TK[0].tolist() == [*paged.slots(0).tolist(), *[-1] * 5]


@pytest.mark.parametrize("fault", ["outside", "negative", "short table", "no query", "shape", "where", "page"])
def test_refuses_memory_that_it_would_misread(fault):
    paged = Paged([30, 9], page=4)
    at_TK = torch.empty(2, 3, dtype=torch.int64)
    q, w = Matrix.of(paged.q_THI), Matrix.of(paged.w_TH)
    pool, sequences = Stored.of(paged.pool_XI), paged.sequences()
    if fault == "outside":
        paged.tables[0][2] = 100
    elif fault == "negative":
        paged.tables[1][0] = -1
    elif fault == "short table":
        sequences.where[1] = 2
    elif fault == "no query":
        q = w = None
    elif fault == "shape":
        w = w.cut(0, 4)
    elif fault == "where":
        sequences = Sequences(sequences.where[:3], 4)
    else:
        sequences = Sequences(sequences.where, 0)
    with pytest.raises(ValueError):
        decoding.select(Matrix.of(at_TK), q, w, pool, sequences)
