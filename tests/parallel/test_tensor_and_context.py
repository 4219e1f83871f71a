"""Tensor and context parallel against one process: loss, every gradient, every expert's load."""

import pytest
from cut_steps import SHAPE, Case, assert_same_step, step, steps
from spawned import run
from tiny import tiny_model

from glm5.errors import ConfigError, InputError
from glm5.parallel import ParallelPlan
from glm5.parallel.context import pieces
from glm5.parallel.tensor import check_tensor_parallel

TOPK_ABOVE = {"index_topk": 64}
TWO = [
    Case(ParallelPlan(tensor=2), "sparse"),
    Case(ParallelPlan(tensor=2), "dense"),
    Case(ParallelPlan(context=2), "sparse"),
    Case(ParallelPlan(context=2), "dense"),
    Case(ParallelPlan(context=2), "sparse", length=31),
    Case(ParallelPlan(context=2), "sparse", changes=TOPK_ABOVE),
]
FOUR = [
    Case(ParallelPlan(tensor=2, context=2)),
    Case(ParallelPlan(tensor=4)),
    Case(ParallelPlan(context=4), length=29),
]


@pytest.fixture(scope="module")
def alone():
    known = {}

    def one_process(case):
        key = (case.attention, case.length, *case.changes.items())
        if key not in known:
            known[key] = step(Case(attention=case.attention, length=case.length, changes=case.changes))
        return known[key]

    return one_process


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["two processes", "four processes"])
def test_many_processes_equal_one(alone, cases):
    for results in run(cases[0].plan.devices, steps, cases):
        for case, result in zip(cases, results, strict=True):
            assert_same_step(result, alone(case), case)


@pytest.mark.parametrize(("tokens", "ranks"), [(16, 2), (17, 2), (29, 4), (5, 4), (4, 4)])
def test_pieces_cover_a_row_once_and_evenly(tokens, ranks):
    parts = [[t for piece in pieces(tokens, ranks, rank) for t in piece] for rank in range(ranks)]
    assert sorted(t for part in parts for t in part) == list(range(tokens))
    lengths = [len(part) for part in parts]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


def test_what_does_not_divide_is_refused():
    model = tiny_model(**SHAPE)
    with pytest.raises(ConfigError, match="num_attention_heads is 4, which does not divide over 3"):
        check_tensor_parallel(model, 3)
    with pytest.raises(ConfigError, match="vocab_size is 97"):
        check_tensor_parallel(tiny_model(), 2)


def too_short():
    with pytest.raises(InputError, match="cannot be cut over 2 ranks"):
        step(Case(ParallelPlan(context=2), length=1))


def test_rows_shorter_than_the_ranks_are_refused():
    assert run(2, too_short) == [None, None]
