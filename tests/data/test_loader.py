"""Shards, packing, loader: every token once, nothing crosses a document, a step is a function of its number."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.data import IGNORED, Loader, TokenDocument, chat_documents, once, open_dataset, write_dataset
from glm5.data.arithmetic import problems
from glm5.data.loader import shuffled
from glm5.data.packing import cut, keep_whole
from glm5.errors import DataError
from glm5.text import Tokenizer


def transitions(batches) -> list[tuple[int, int]]:
    """(token, next token) of every position that is not padding."""
    pairs: list[tuple[int, int]] = []
    for batch in batches:
        real = batch.segment_ids_BT >= 0
        pairs += zip(batch.input_ids_BT[real].tolist(), batch.targets_BT[real].tolist(), strict=True)
    return pairs


def expected_transitions(dataset) -> list[tuple[int, int]]:
    documents = (dataset.ids(i).tolist() for i in range(len(dataset)))
    return [pair for ids in documents for pair in itertools.pairwise(ids)]


def test_a_dataset_gives_the_text_back(corpus, tokenizer, dataset):
    for i, text in enumerate(corpus.texts("train")):
        assert tokenizer.decode(dataset.ids(i)[1:-1].tolist()) == text
        assert dataset.byte_counts[i] == len(text.encode())
    assert i + 1 == len(dataset) and dataset.ids(0)[0] == dataset.ids(0)[-1] == tokenizer.pad_id


def test_small_shards_are_the_same_dataset(dataset, tokenizer, tmp_path):
    documents = [TokenDocument(dataset.ids(i).tolist(), int(dataset.byte_counts[i])) for i in range(len(dataset))]
    split = write_dataset(tmp_path / "d", documents, tokenizer, shard_tokens=200)
    assert len(split.manifest["shards"]) > 5
    reopened = open_dataset(tmp_path / "d", tokenizer)
    for a, b in zip(Loader(dataset, rows=4, length=32, seed=3).batch(5).__dict__.values(),
                    Loader(reopened, rows=4, length=32, seed=3).batch(5).__dict__.values(), strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_once_covers_every_transition_exactly_once(dataset):
    assert transitions(once(dataset, rows=3, length=17)) == expected_transitions(dataset)


def test_an_epoch_is_every_transition_but_the_dropped_rest(dataset):
    loader = Loader(dataset, rows=1, length=17, seed=0)
    epoch = transitions(loader.batch(step) for step in range(loader.streams[0].packing.rows))
    everything = expected_transitions(dataset)
    assert len(everything) - len(epoch) < 17
    remaining = sorted(everything)
    for pair in epoch:
        remaining.remove(pair)  # raises when a pair came twice


def test_each_epoch_visits_the_same_rows_in_an_order_of_its_own(dataset):
    loader = Loader(dataset, rows=1, length=17, seed=0)
    count = loader.streams[0].packing.rows
    first, second = (
        [tuple(loader.batch(epoch * count + i).input_ids_BT[0].tolist()) for i in range(count)] for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second) and first != second


def test_steps_do_not_depend_on_what_was_asked_before(dataset):
    asked = Loader(dataset, rows=4, length=32, seed=7)
    far = asked.streams[0].packing.rows // 2 + 1  # in the third epoch
    for step in (0, far, 3, far, 0):
        fresh = Loader(dataset, rows=4, length=32, seed=7).batch(step)
        assert torch.equal(asked.batch(step).input_ids_BT, fresh.input_ids_BT)
    other = Loader(dataset, rows=4, length=32, seed=8).batch(0)
    assert not torch.equal(asked.batch(0).input_ids_BT, other.input_ids_BT)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_same_global_batch(dataset, world):
    whole = Loader(dataset, rows=8, length=16, seed=1).batch(9)
    parts = [Loader(dataset, rows=8, length=16, seed=1, rank=r, world=world).batch(9) for r in range(world)]
    for r, part in enumerate(parts):
        assert torch.equal(part.input_ids_BT, whole.input_ids_BT[r::world])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 25))
def test_cut_covers_each_position_once(positions, length):
    sizes = np.array(positions)
    packing = cut(sizes, shuffled(len(sizes), 5, 0), length, keep_rest=True)
    seen = [
        (d, s + i) for d, s, n in zip(packing.document, packing.start, packing.length, strict=True) for i in range(n)
    ]
    assert sorted(seen) == [(d, i) for d, n in enumerate(positions) for i in range(n)]
    rows = [int(packing.length[a:b].sum()) for a, b in zip(packing.row_edges, packing.row_edges[1:], strict=False)]
    assert all(n == length for n in rows[:-1]) and 0 < rows[-1] <= length


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 25))
def test_keep_whole_never_cuts_what_fits(positions, length):
    sizes = np.array(positions)
    packing = keep_whole(sizes, np.arange(len(sizes)), length)
    assert packing.document.tolist() == list(range(len(positions)))
    assert packing.length.tolist() == [min(n, length) for n in positions] and not packing.start.any()
    for a, b in zip(packing.row_edges, packing.row_edges[1:], strict=False):
        assert b > a and packing.length[a:b].sum() <= length


def test_shuffled_is_a_fixed_permutation():
    order = shuffled(1000, 1, 2)
    assert sorted(order.tolist()) == list(range(1000))
    assert order[:5].tolist() == shuffled(1000, 1, 2)[:5].tolist() != shuffled(1000, 1, 3)[:5].tolist()
    assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.1


def test_chat_rows_learn_the_answer_and_its_end_only(tokenizer, tmp_path):
    asked = list(problems(0, 40))
    documents = chat_documents((p.messages() for p in asked), tokenizer)
    chat = write_dataset(tmp_path / "chat", documents, tokenizer)
    batch = Loader(open_dataset(tmp_path / "chat"), rows=4, length=64, seed=0, packing="keep_whole").batch(0)
    learned = [tokenizer.decode(row[row != IGNORED].tolist()) for row in batch.targets_BT]
    answers = {p.answer for p in asked}
    for text in learned:
        turns = text.replace("</think>", "").split("<|user|>")[:-1]
        assert turns and all(turn in answers for turn in turns)
    assert len(chat) == 40


def test_documents_that_predict_nothing_are_counted_and_left_out(tokenizer, tmp_path):
    documents = [TokenDocument(ids, 1) for ids in ([], [5], [5, 6, 7], [])]
    made = write_dataset(tmp_path / "d", documents, tokenizer)
    assert len(made) == 1 and made.manifest["too_short"] == 3 and made.manifest["tokens"] == 3
    with pytest.raises(DataError, match="the source is empty"):
        write_dataset(tmp_path / "none", documents[:2], tokenizer)


def damage_shard(d):
    shard = d / "shard-00000.tokens.npy"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)


def edit_manifest(**changes):
    def edit(d):
        manifest = json.loads((d / "manifest.json").read_text()) | changes
        kept = {name: value for name, value in manifest.items() if value is not None}
        (d / "manifest.json").write_text(json.dumps(kept))

    return edit


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_shard, r"shard-00000.tokens.npy does not match the manifest \(damaged or edited\); build"),
        (lambda d: (d / "shard-00000.starts.npy").write_bytes(b""), "shard-00000.starts.npy does not match"),
        (
            lambda d: (d / "shard-00000.bytes.npy").unlink(),
            "shard-00000.bytes.npy is listed in the man",
        ),
        (lambda d: (d / "manifest.json").unlink(), "has no manifest.json, so it is no finished token dataset"),
        (lambda d: (d / "manifest.json").write_text("[1"), "is not JSON"),
        (edit_manifest(kind="corpus"), "does not describe a token dataset"),
        (edit_manifest(files=None), "has no entry 'files'"),
        (edit_manifest(shards=None), "has no entry 'shards'"),
        (edit_manifest(tokenizer_sha256="0" * 64), "made with another tokenizer"),
    ],
)
def test_a_damaged_dataset_is_refused_before_use(damage, sentence, dataset, tokenizer, tmp_path):
    shutil.copytree(dataset.directory, tmp_path / "d")
    damage(tmp_path / "d")
    with pytest.raises(DataError, match=sentence):
        open_dataset(tmp_path / "d", tokenizer)


def test_refusals(dataset, tokenizer, tmp_path):
    with pytest.raises(DataError, match="multiple of 3"):
        Loader(dataset, rows=4, length=8, seed=0, world=3)
    with pytest.raises(DataError, match="does not fill one row"):
        Loader(dataset, rows=1, length=10**6, seed=0)
    with pytest.raises(DataError, match="the source is empty"):
        write_dataset(tmp_path / "none", [], tokenizer)
    with pytest.raises(DataError, match="another tokenizer"):
        open_dataset(dataset.directory, Tokenizer.train(["other words entirely"], 400))


def test_problems_are_right_and_split_by_expression():
    train, heldout = (list(problems(1, 300, split=split)) for split in ("train", "heldout"))
    assert all(int(p.answer) == eval(p.expression) for p in train + heldout)
    assert not {p.expression for p in train} & {p.expression for p in heldout}
    assert train == list(problems(1, 300)) != list(problems(2, 300))
