"""Long-context examples: the answer is where the question says, splits are disjoint, all is a function of the seed."""

import dataclasses
import itertools
import re
from collections import Counter

import pytest
from long_text import long_text, opened

from glm5.data import Loader, write_dataset
from glm5.data.long_context import LongContext, single_token_words, split_of
from glm5.errors import ConfigError, DataError

KINDS = ("needle", "multi_needle", "key_value", "repeat")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return long_text(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def made(root):
    return {split: LongContext(*opened(root, split), split=split, words=None) for split in ("train", "heldout")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 100, 513])
def test_every_example_fills_its_row_and_can_be_answered_from_its_past(made, kind, length):
    for index in range(12):
        example = made["train"].example(kind, length, index)
        assert len(example.ids) == length + 1 and example.answers
        for (start, stop), depth in zip(example.answers, example.depths, strict=True):
            key, value = example.ids[start - 1], example.ids[start:stop]
            before = [i for i in range(1, start - 1) if example.ids[i] == key]
            assert any(example.ids[i + 1 : i + 1 + len(value)] == value for i in before)
            assert 0 <= depth < start / length


@pytest.mark.parametrize("kind", ["needle", "multi_needle", "key_value"])
@pytest.mark.parametrize("words", [128, None])
def test_a_question_has_one_answer(root, kind, words):
    """Key and value stand in the row twice, in the pair and in the question: no filler contradicts a needle."""
    maker = LongContext(*opened(root, "heldout"), split="heldout", words=words)
    for index in range(6):
        example = maker.example(kind, 400, index)
        for start, stop in example.answers:
            key, value = example.ids[start - 1], example.ids[stop - 1]
            assert example.ids.count(key) == example.ids.count(value) == 2
            assert example.ids[example.ids.index(key) + 1] == value


def test_needles_read_as_sentences_and_the_question_asks_for_the_value(made):
    maker = made["heldout"]
    example = maker.needles(200, 0, depth=0.5)
    text = maker.tokenizer.decode(example.ids)
    key, value = re.findall(r"\nThe secret words are (\w+) (\w+)", text)[0]
    assert text.endswith(f"The secret words are {key} {value}")
    assert maker.tokenizer.decode(example.ids[-1:]) == f" {value}"
    assert text.count("The secret words are") == 2


@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0.0, 0.2), (0.5, 0.35, 0.65), (1.0, 0.85, 1.0)])
def test_depth_places_the_needle(made, depth, low, high):
    for index in range(8):
        assert low <= made["train"].needles(600, index, depth=depth).depths[0] <= high


def test_several_needles_are_asked_in_another_order(made):
    orders = [made["train"].needles(400, index, needles=6).depths for index in range(6)]
    assert all(len(set(order)) == 6 for order in orders)
    assert any(order != sorted(order) for order in orders)


def test_the_splits_share_no_pair(made):
    for split, maker in made.items():
        for kind in ("needle", "multi_needle", "key_value"):
            for index in range(4):
                example = maker.example(kind, 300, index)
                for start, stop in example.answers:
                    key, value = (maker.tokenizer.decode(example.ids[i : i + 1]) for i in (start - 1, stop - 1))
                    assert split_of(key, value) == split


def test_about_a_fifth_of_all_pairs_is_held_out():
    words = [f" word{i}" for i in range(60)]
    held = sum(split_of(a, b) == "heldout" for a in words for b in words)
    assert 0.15 < held / 3600 < 0.25


def test_words_are_whole_tokens(root):
    tokenizer, _ = opened(root, "train")
    for token in single_token_words(tokenizer)[:50]:
        assert re.fullmatch(r" [A-Za-z]{3,}", tokenizer.decode([token]))


def test_with_zipf_the_first_words_come_often_and_all_come(root):
    maker = LongContext(*opened(root, "train"), split="train", words=None, zipf=4)
    seen = Counter(token for index in range(60) for token in maker.example("key_value", 100, index).ids)
    first, last = (sum(seen[word] for word in part) for part in (maker.words[:20], maker.words[-20:]))
    assert first > 4 * last > 0
    with pytest.raises(ConfigError, match="above 0"):
        LongContext(*opened(root, "train"), split="train", zipf=0)


def test_fewer_words_are_the_first_of_more(root, made):
    few, more = (LongContext(*opened(root, "train"), split="train", words=count) for count in (32, 80))
    assert len(few.words) == 32 and more.words[:32] == few.words and made["train"].words[:80] == more.words
    for index in range(8):  # repeated passages are of these words too
        assert set(few.example("repeat", 100, index).ids[1:]) <= set(few.words)
    with pytest.raises(DataError, match="32 or more"):
        LongContext(*opened(root, "train"), split="train", words=10)


def test_examples_depend_on_seed_and_index_alone(root, made):
    again = LongContext(*opened(root, "train"), split="train", words=None)
    other = LongContext(*opened(root, "train"), split="train", seed=1, words=None)
    for kind in KINDS:
        made["train"].example(kind, 96, 5)  # what was made before must not matter
        assert again.example(kind, 128, 2) == made["train"].example(kind, 128, 2)
        assert other.example(kind, 128, 2).ids != again.example(kind, 128, 2).ids
        assert again.example(kind, 128, 3).ids != again.example(kind, 128, 2).ids


def test_as_a_dataset_only_answers_are_learned(made, tmp_path):
    maker = made["train"]
    data = write_dataset(tmp_path / "set", maker.documents(10, 128, {"needle": 1.0, "key_value": 1.0}), maker.tokenizer)
    batch = Loader(data, rows=10, length=128, seed=0, packing="keep_whole").batch(0)
    assert bool((batch.segment_ids_BT == 0).all()), "each example fills a row"
    learned = int((batch.targets_BT >= 0).sum())
    assert learned == sum(data.learn(i).sum() for i in range(10)) > 0
    whole = maker.example("needle", 128, 0).document(maker.tokenizer, learn="all")
    assert whole.learn is None


def test_kinds_are_mixed_by_weight(made):
    counts = [sum(d.learn) for d in made["train"].documents(60, 64, {"needle": 3.0, "key_value": 1.0})]
    assert 30 <= counts.count(1) <= 57


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.example("needles", 64, 0), "Did you mean 'needle'"),
        (lambda m: m.example("needle", 8, 0), "at least 64"),
        (lambda m: list(m.documents(1, 64, {})), "at least one kind"),
        (lambda m: m.needles(64, 0, needles=9), "do not fit"),
    ],
)
def test_what_cannot_be_made_is_refused(made, call, says):
    with pytest.raises(ConfigError, match=says):
        call(made["train"])


def test_an_example_is_plain_data(made):
    example = made["train"].example("needle", 64, 0)
    assert set(dataclasses.asdict(example)) == {"ids", "answers", "depths"}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_neighbours_in_a_repeated_passage_of_words_are_pairs_of_the_split(root, split):
    """Otherwise repeats would teach what needles ask: 2,391 of 3,279 held-out pairs were once taught so."""
    source = LongContext(*opened(root, split), split=split, words=64, zipf=8.0)
    for index in range(20):
        words = source.example("repeat", 64, index).ids[1:]
        texts = [source.tokenizer.decode([word]) for word in words]
        assert {split_of(*pair) for pair in itertools.pairwise(texts)} == {split}
