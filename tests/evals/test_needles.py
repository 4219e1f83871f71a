"""The needle evaluation: a model that looks up finds all, one that does not finds none, and the grid adds up."""

import dataclasses
import json
import math

import pytest
import torch
from long_text import long_text, opened
from tiny import tiny_model

import glm5
from glm5.data.long_context import LongContext
from glm5.errors import ConfigError
from glm5.evals.needles import NeedleConfig, compare_needles, find_needles, needles_of, right_answers, write_needles
from glm5.model import ModelOutput


class LooksUp(torch.nn.Module):
    """Says what followed the same token last time; deaf to what stands before `since`."""

    def __init__(self, vocabulary: int, since: int = 0) -> None:
        super().__init__()
        self.vocabulary, self.since, self.attention = vocabulary, since, set()

    def forward(self, ids_BT, *, attention, logits_to_keep):
        self.attention.add(attention)
        logits = torch.zeros(*ids_BT.shape, self.vocabulary)
        for b, row in enumerate(ids_BT.tolist()):
            last: dict[int, int] = {}
            for t, token in enumerate(row):
                if token in last:
                    logits[b, t, last[token]] = 1.0
                if t >= self.since and t + 1 < len(row):
                    last[token] = row[t + 1]
        return ModelOutput(logits=logits[:, -logits_to_keep:])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return long_text(tmp_path_factory.mktemp("long"))


GRID = NeedleConfig(lengths=(96, 160), depths=(0.0, 1.0), per_cell=3, rows=2)


def test_a_model_that_looks_up_finds_every_needle(root):
    tokenizer, filler = opened(root, "heldout")
    model = LooksUp(tokenizer.vocab_size)
    result = find_needles(model, tokenizer, filler, GRID)
    assert (result.accuracy().correct, result.accuracy().total) == (12, 12)
    assert model.attention == {"sparse"}


def test_by_length_and_depth(root):
    """Deaf to the first 60 tokens: needles at depth 0 are lost, those at depth 1 found."""
    tokenizer, filler = opened(root, "heldout")
    result = find_needles(LooksUp(tokenizer.vocab_size, since=60), tokenizer, filler, GRID)
    for length in GRID.lengths:
        assert result.accuracy(length, 0.0).correct == 0 and result.accuracy(length, 1.0).correct == 3
        assert result.accuracy(length).value == 0.5
    assert [(a.length, a.depth) for a in result.answers[:6]] == [(96, 0.0)] * 3 + [(96, 1.0)] * 3


def test_dense_and_sparse_answer_the_same_questions(root):
    tokenizer, filler = opened(root, "heldout")
    all_, some = (find_needles(LooksUp(tokenizer.vocab_size, since=s), tokenizer, filler, GRID) for s in (0, 60))
    difference = compare_needles(all_, some)
    assert (difference.value, difference.lost, difference.gained, difference.total) == (-0.5, 6, 0, 12)
    assert difference.low < -0.5 < difference.high < 0
    assert compare_needles(all_, all_, 96).value == 0


def test_every_token_of_an_answer_must_be_right(root):
    tokenizer, filler = opened(root, "heldout")
    example = LongContext(tokenizer, filler, split="heldout").needles(200, 0, needles=2)
    start = example.answers[0][0]
    longer = dataclasses.replace(example, answers=[(start, start + 2)])  # the value and what stands after it
    model = LooksUp(tokenizer.vocab_size)
    assert right_answers(model, [example], "dense") == [[True, True]]
    assert right_answers(model, [longer], "dense") == [[True]]
    longer.ids[start + 1] += 1
    assert right_answers(model, [longer], "dense") == [[False]]


def test_a_directory_is_evaluated_and_written(root, tmp_path):
    tokenizer, _ = opened(root, "heldout")
    model = tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=0)
    glm5.save_model(model, tmp_path / "model", tokenizer)
    seen = []
    result = needles_of(tmp_path / "model", root / "heldout", GRID, show=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)
    again = needles_of(tmp_path / "model", root / "heldout", GRID)
    assert again.answers == result.answers
    write_needles(tmp_path / "out", result)
    written = json.loads((tmp_path / "out" / "needles.json").read_text())
    assert written["accuracy"]["total"] == 12 and len(written["cells"]) == 4
    assert len((tmp_path / "out" / "needles.jsonl").read_text().splitlines()) == 12
    assert not math.isnan(written["lengths"]["96"]["value"])


@pytest.mark.parametrize(
    "change", [{"lengths": ()}, {"lengths": (8,)}, {"depths": (1.5,)}, {"per_cell": 0}, {"attention": "none"}]
)
def test_settings_that_ask_nothing_are_refused(change):
    with pytest.raises(ConfigError):
        NeedleConfig(**change)
