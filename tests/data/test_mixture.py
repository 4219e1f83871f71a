"""Mixtures and batch warm-up: shares hold in every window, ranks and steps change nothing, each row once an epoch."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.data import BatchWarmup, Loader, Share, TokenDocument, open_mixture, write_dataset
from glm5.data.mixture import interleave, quotas
from glm5.errors import DataError
from glm5.text import Tokenizer

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def shares(tokenizer, tmp_path_factory):
    """Three datasets whose tokens tell them apart, in documents of different lengths."""
    root = tmp_path_factory.mktemp("mixture")
    made = []
    for k, documents in enumerate((17, 5, 29)):
        first = 10 + 150 * k
        texts = [TokenDocument([first + (i + j) % 150 for j in range(3 + 7 * (i % 5))], 1) for i in range(documents)]
        write_dataset(root / str(k), texts, tokenizer)
        made.append(Share(path=root / str(k), weight=(3.0, 1.0, 0.5)[k]))
    return made


def source_of(ids_T: torch.Tensor) -> int:
    return (int(ids_T[0]) - 10) // 150


@settings(deadline=None, max_examples=80)
@given(WEIGHTS, st.integers(0, 3000), st.integers(1, 300))
def test_every_window_holds_the_weights(weights, start, size):
    pattern = interleave(weights)
    shares = np.array(weights) / sum(weights)
    bound = 1 - 1 / max(2 * len(weights) - 2, 1) if len(weights) > 1 else 0
    assert np.all(abs(pattern.counts(start) - start * shares) <= bound + 1e-9)
    window = pattern.counts(start + size) - pattern.counts(start)
    assert np.all(abs(window - size * shares) <= 2 * bound + 1e-9) and window.sum() == size


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, st.integers(0, 500))
def test_the_closed_form_counts_what_a_replay_counts(weights, row):
    pattern = interleave(weights)
    replay = [pattern.at(n)[0] for n in range(row)]
    source, before = pattern.at(row)
    assert before == replay.count(source)
    assert pattern.counts(row).tolist() == [replay.count(k) for k in range(len(weights))]


def test_weights_are_exact_where_the_period_allows_it():
    assert quotas([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert quotas([3, 1]) == [3, 1] and quotas([5.0]) == [1]
    rounded = quotas([1 / 3, 0.123456789, 2.7])
    assert sum(rounded) == 10_000 and abs(rounded[0] / 10_000 - (1 / 3) / (1 / 3 + 0.123456789 + 2.7)) < 1e-4
    with pytest.raises(DataError, match="less than one row in 10,000"):
        quotas([1.0, 1.23456e-5])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 400), st.integers(0, 5), st.sampled_from([1, 2, 3, 6]), st.booleans())
def test_ranks_together_give_the_single_rank_batch(shares, step, seed, world, warm):
    data = open_mixture(shares)
    warmup = BatchWarmup(start=6, steps=50) if warm else None
    settings = {"rows": 24, "length": 8, "seed": seed, "warmup": warmup}
    whole = Loader(data, **settings).batch(step)
    assert len(whole.input_ids_BT) == Loader(data, **settings).rows_at(step)
    for rank in range(world):
        part = Loader(data, **settings, rank=rank, world=world).batch(step)
        for mine, all_rows in zip(vars(part).values(), vars(whole).values(), strict=True):
            assert torch.equal(mine, all_rows[rank::world])


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 120), st.integers(0, 3), st.booleans())
def test_a_step_alone_is_the_step_in_sequence(shares, step, seed, warm):
    data = open_mixture(shares)
    settings = {"rows": 12, "length": 8, "seed": seed, "warmup": BatchWarmup(start=4, steps=40) if warm else None}
    walked = Loader(data, **settings)
    for earlier in range(step):
        walked.plan(earlier)
    alone = Loader(data, **settings)
    assert alone.rows_before(step) == sum(alone.rows_at(earlier) for earlier in range(step))
    assert torch.equal(alone.batch(step).input_ids_BT, walked.batch(step).input_ids_BT)


@pytest.mark.parametrize("warmup", [None, BatchWarmup(start=3, steps=20)])
def test_every_row_of_every_source_comes_once_in_each_of_its_epochs(shares, warmup):
    loader = Loader(open_mixture(shares), rows=9, length=8, seed=4, warmup=warmup)
    steps = 150
    seen = [[] for _ in shares]
    for step in range(steps):
        for k, row in loader.plan(step):
            seen[k].append(row)
    for k, (rows, stream) in enumerate(zip(seen, loader.streams, strict=True)):
        size = stream.packing.rows
        assert len(rows) > 2 * size and loader.epochs(steps)[k] == len(rows) / size
        visits = np.bincount(rows, minlength=size)
        assert visits.max() - visits.min() <= 1
    first = [rows[: stream.packing.rows] for rows, stream in zip(seen, loader.streams, strict=True)]
    assert first[0] != sorted(first[0])


def test_batches_hold_the_weights_and_ranks_are_not_bound_to_a_source(shares):
    pair = [Share(path=shares[0].path), Share(path=shares[2].path)]
    loader = Loader(open_mixture(pair), rows=8, length=8, seed=0)
    by_place = np.zeros(8)
    for step in range(60):
        sources = np.array([source_of(row) // 2 for row in loader.batch(step).input_ids_BT])
        assert sources.sum() == 4
        by_place += sources
    assert by_place.min() > 15 and by_place.max() < 45


def test_one_share_is_the_plain_dataset_to_the_bit(dataset, tokenizer):
    mixed = open_mixture([Share(path=dataset.directory, weight=0.3)], tokenizer)
    assert mixed.sha256 == dataset.sha256
    for step in (0, 7, 400):
        a, b = (Loader(data, rows=4, length=32, seed=2).batch(step) for data in (dataset, mixed))
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_long_documents_can_be_a_share_of_their_own(shares):
    long = Share(path=shares[2].path, min_tokens=20)
    loader = Loader(open_mixture([shares[2], long]), rows=4, length=8, seed=0)
    lengths = loader.streams[1].dataset.lengths
    assert set(loader.streams[1].packing.document) <= set(np.flatnonzero(lengths >= 20))
    assert loader.streams[0].packing.rows > loader.streams[1].packing.rows > 0
    assert loader.data.sha256 != open_mixture([shares[2]]).sha256


def test_a_share_may_be_packed_in_its_own_way(shares):
    whole = Share(path=shares[0].path, packing="keep_whole")
    loader = Loader(open_mixture([shares[1], whole]), rows=4, length=16, seed=0)
    assert not loader.streams[1].packing.start.any() and loader.streams[0].packing.start.any()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 12), st.integers(1, 60), st.integers(0, 90))
def test_warm_up_is_monotone_ends_full_and_sums_in_closed_form(start, levels, steps, step):
    warmup, full = BatchWarmup(start=start, steps=steps, multiple=2), start + 2 * levels
    rows = [warmup.rows(s, full) for s in range(max(step, steps) + 1)]
    assert rows[0] == start and rows[steps] == full and all(a <= b for a, b in itertools.pairwise(rows))
    assert all((count - start) % 2 == 0 for count in rows)
    assert warmup.before(step, full) == sum(rows[:step])


def test_refusals(shares, tmp_path):
    with pytest.raises(DataError, match="name at least one"):
        open_mixture([])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="give a number above 0"):
            Share(path=tmp_path, weight=weight)
    with pytest.raises(DataError, match="no manifest"):
        open_mixture([*shares, Share(path=tmp_path)])
    with pytest.raises(DataError, match="at least 900 tokens"):
        Loader(open_mixture([Share(path=shares[0].path, min_tokens=900)]), rows=1, length=8, seed=0)
    write_dataset(tmp_path / "other", [TokenDocument([1, 2, 3], 3)], Tokenizer.train(["other words"], 400))
    with pytest.raises(DataError, match="different tokenizers"):
        open_mixture([shares[0], Share(path=tmp_path / "other")])
    data = open_mixture(shares)
    with pytest.raises(DataError, match="not reached from 4 in steps of 4"):
        Loader(data, rows=10, length=8, seed=0, warmup=BatchWarmup(start=4, steps=5))
    with pytest.raises(DataError, match="does not divide over 2 ranks"):
        Loader(data, rows=12, length=8, seed=0, world=2, warmup=BatchWarmup(start=3, steps=5))
    with pytest.raises(DataError, match="at least 1"):
        BatchWarmup(start=0, steps=5)
