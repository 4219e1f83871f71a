"""Tensor, context and pipeline parallel, alone and two at once, against one process: loss, gradients, loads."""

import pytest
from cut_steps import SHAPE, Case, assert_same_step, step, steps
from spawned import run
from tiny import tiny_model

from glm5.errors import InputError
from glm5.model import add_adapters
from glm5.parallel import ParallelPlan as P
from glm5.parallel.context import pieces
from glm5.parallel.tensor import apply_tensor_parallel

FEW = 4
"""Positions at once: the head and its gradients by pieces, however the head is cut."""
TOPK_ABOVE = {"index_topk": 64}
TWO = [
    Case(P(tensor=2), "sparse"),
    Case(P(tensor=2), "dense"),
    Case(P(context=2), "sparse"),
    Case(P(context=2), "dense", length=31),
    Case(P(context=2), "sparse", changes=TOPK_ABOVE),
    Case(P(pipeline=2), "sparse"),
    Case(P(pipeline=2), "dense", changes={"num_nextn_predict_layers": 0}),
    Case(P(context=2, expert=2), "sparse"),
    *(Case(plan, positions=FEW) for plan in (P(data_shard=2), P(tensor=2), P(context=2), P(pipeline=2))),
]
FOUR = [
    Case(P(context=4), length=29),
    Case(P(tensor=2, context=2)),
    Case(P(tensor=2, data_shard=2)),
    Case(P(tensor=2, data_shard=2, expert=2)),
    Case(P(tensor=2, pipeline=2)),
    Case(P(context=2, data_shard=2)),
    Case(P(context=2, data_shard=2, expert=2)),
    Case(P(context=2, pipeline=2)),
    Case(P(pipeline=2, data_shard=2)),
    Case(P(pipeline=2, data_shard=2, expert=2)),
    Case(P(tensor=2, data_shard=2), positions=FEW),
]
MORE = [
    Case(P(tensor=2, pipeline=2), positions=FEW),
    Case(P(tensor=4)),
    Case(P(tensor=2, data_replicate=2)),
    Case(P(context=2, data_replicate=2)),
    Case(P(pipeline=2, data_replicate=2)),
    Case(P(context=4, expert=2), length=31),
    Case(P(tensor=2, context=2, expert=2), "dense"),
    Case(
        P(pipeline=4),
        changes={"num_hidden_layers": 6, "indexer_types": ("full", "shared", "full", "full", "full", "shared")},
    ),
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


def check(alone, cases):
    for results in run(cases[0].plan.devices, steps, cases):
        for case, result in zip(cases, results, strict=True):
            assert_same_step(result, alone(case), case)


def test_two_processes_equal_one(alone):
    check(alone, TWO)


def test_two_axes_at_once_equal_one_process(alone):
    check(alone, FOUR)


@pytest.mark.soak
def test_more_plans_equal_one_process(alone):
    check(alone, MORE)


@pytest.mark.parametrize(("tokens", "ranks"), [(16, 2), (17, 2), (29, 4), (5, 4), (4, 4)])
def test_pieces_cover_a_row_once_and_evenly(tokens, ranks):
    parts = [[t for piece in pieces(tokens, ranks, rank) for t in piece] for rank in range(ranks)]
    assert sorted(t for part in parts for t in part) == list(range(tokens))
    lengths = [len(part) for part in parts]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


def test_adapters_are_refused():
    model = tiny_model(**SHAPE)
    add_adapters(model)
    with pytest.raises(InputError, match="Adapters"):
        apply_tensor_parallel(model, None)


def too_short():
    with pytest.raises(InputError, match="cannot be cut over"):
        step(Case(P(context=2), length=1))


def test_rows_shorter_than_the_ranks_are_refused():
    assert run(2, too_short) == [None, None]
