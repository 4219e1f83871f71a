"""The indexer's recall on held-out text: which rows, which layers, what is refused, and that training raises it."""

import numpy as np
import pytest
import torch

from glm5 import GLM5
from glm5.data import open_dataset
from glm5.errors import InputError
from glm5.model import initialize_
from glm5.train.indexer_recall import long_rows, measure_indexer_recall


@pytest.fixture
def model(tiny):
    model = GLM5(tiny[1])
    initialize_(model, 0.2, seed=0)
    return model


@pytest.fixture
def heldout(tiny):
    return open_dataset(tiny[0] / "train")


def test_shares_per_layer_and_the_default_length(model, heldout):
    found = measure_indexer_recall(model, heldout, rows=3)
    assert (found.length, found.index_topk, found.rows, found.joined) == (128, 16, 3, True)
    assert sorted(found.layers) == [0, 1]
    for layer in found.layers.values():
        assert 0 < layer.positions < 1 and 0 < layer.mass < 1
    assert found.worst_mass <= found.mass
    assert model.training, "the model is left as it was"


def test_the_number_of_rows_at_once_does_not_matter(model, heldout):
    one, all_ = (measure_indexer_recall(model, heldout, rows=3, rows_at_once=n) for n in (1, 3))
    assert one.mass == pytest.approx(all_.mass, abs=1e-5) and one.positions == pytest.approx(all_.positions, abs=1e-5)


def test_long_documents_are_taken_whole_and_short_ones_joined(tiny):
    data = open_dataset(tiny[0] / "heldout")
    short = int(data.lengths.min())
    rows, joined = long_rows(data, 2, short)
    assert not joined and np.array_equal(rows[0], data.ids(0, 0, short))
    rows, joined = long_rows(data, 2, int(data.lengths.max()) + 1)
    assert joined and np.array_equal(rows[0, : data.lengths[0]], data.ids(0)[: rows.shape[1]])


def test_learning_the_kl_raises_the_recalled_mass(model, heldout):
    """40 steps of the warm-up loss of DSA, on the rows that are measured: the indexer comes to find the attention."""
    before = measure_indexer_recall(model, heldout, length=48, rows=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.from_numpy(long_rows(heldout, 2, 48)[0])
    for _ in range(40):
        out = model(ids, attention="dense", collect={"indexer_kl"}, logits_to_keep=1)
        torch.stack(list(out.indexer_kl.values())).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = measure_indexer_recall(model, heldout, length=48, rows=2)
    assert after.mass > before.mass + 0.02 and after.positions > before.positions


@pytest.mark.parametrize(("length", "rows"), [(16, 2), (64, 0), (64, 10_000)])
def test_what_cannot_be_measured_is_refused(model, heldout, length, rows):
    with pytest.raises(InputError):
        measure_indexer_recall(model, heldout, length=length, rows=rows)
