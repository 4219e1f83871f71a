"""Recall of the true top-k in blocks, against a version with whole matrices and Python loops."""

import pytest
import torch
from tiny import tiny_model

from glm5.model import mla
from glm5.ops import indexer_recall as module
from glm5.ops import reference
from glm5.ops.indexer_recall import indexer_recall
from glm5.ops.spans import plain_spans, segment_spans


def parts(batch: int, tokens: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, tokens, 3, 10),
        (batch, tokens, 10),
        (batch, tokens, 16, 8),
        (batch, tokens, 8),
        (batch, tokens, 16),
    ]
    q, latents, iq, ik, iw = (torch.randn(*shape, generator=g) for shape in shapes)
    return q, latents, (iq, ik, iw)


def by_hand(q, latents, scale, index, spans, k):
    positions, mass = [], []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            lo, hi = int(spans.lo_BT[b, t]), int(spans.hi_BT[b, t])
            if hi - lo <= k:
                continue
            keys = latents[b, lo:hi]
            p = torch.softmax(q[b, t] @ keys.T * scale, dim=-1).sum(0)
            score = (index[2][b, t][:, None] * (index[0][b, t] @ index[1][b, lo:hi].T).relu()).sum(0)
            true = p.argsort(descending=True, stable=True)[:k]
            mine = score.argsort(descending=True, stable=True)[:k]
            positions.append(len(set(true.tolist()) & set(mine.tolist())) / k)
            mass.append((p[mine].sum() / p[true].sum()).item())
    return sum(positions) / len(positions), sum(mass) / len(mass)


@pytest.mark.parametrize("budget", [1 << 23, 500])
@pytest.mark.parametrize("packed", [False, True])
def test_equal_to_a_plain_loop(monkeypatch, budget, packed):
    monkeypatch.setattr(module, "BLOCK_BUDGET", budget)
    q, latents, index = parts(2, 40)
    spans = plain_spans(2, 40, 0, None, torch.device("cpu"))
    if packed:
        segments = torch.tensor([[0] * 25 + [1] * 15, [3] * 33 + [-1] * 7])
        spans = segment_spans(segments, 40, None)
    got = indexer_recall(q, latents, 0.4, index, spans, 6)
    torch.testing.assert_close(torch.stack(got), torch.tensor(by_hand(q, latents, 0.4, index, spans, 6)))


def test_an_indexer_that_scores_as_the_attention_does_recalls_everything():
    """One attention head and one index head with the same non-negative products."""
    g = torch.Generator().manual_seed(1)
    q, k = torch.rand(1, 30, 1, 8, generator=g), torch.rand(1, 30, 8, generator=g)
    index = (q.repeat(1, 1, 16, 1), k, torch.ones(1, 30, 16))
    spans = plain_spans(1, 30, 0, None, torch.device("cpu"))
    positions, mass = indexer_recall(q, k, 1.0, index, spans, 5)
    assert positions > 0.999 and mass > 0.999
    backwards = (index[0], k, -index[2])
    assert max(indexer_recall(q, k, 1.0, backwards, spans, 5)) < 0.9


def test_without_a_query_that_must_choose_there_is_no_number():
    q, latents, index = parts(1, 6)
    assert torch.stack(indexer_recall(q, latents, 1.0, index, plain_spans(1, 6, 0, None, q.device), 6)).isnan().all()


def test_the_model_collects_it_per_full_layer_and_averages_over_sharing_ones():
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(5))
    model = tiny_model(num_hidden_layers=3, indexer_types=("full", "full", "shared"))
    found = model(ids, attention="dense", collect={"indexer_recall"}).indexer_recall
    assert sorted(found) == [0, 1]
    assert all(0 < share < 1 for pair in found.values() for share in pair)
    # The last layer with an indexer's own number is a mean with the layer that shares it.
    alone = tiny_model(num_hidden_layers=3, indexer_types=("full", "full", "shared"))
    captured = []
    original = module.indexer_recall

    def spy(*inputs):
        captured.append(original(*inputs))
        return captured[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla, "indexer_recall", spy)
        found = alone(ids, attention="dense", collect={"indexer_recall"}).indexer_recall
    assert len(captured) == 3
    assert found[1][1] == torch.stack([captured[1][1], captured[2][1]]).mean()


def test_collected_selection_gives_the_same_positions():
    """What dense attention is measured against is what sparse attention would select in the first layer."""
    ids = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(5))
    model = tiny_model()
    captured = {}

    original = mla.indexer_recall

    def spy(q, latents, scale, index, *rest):
        captured.setdefault("index", index)
        return original(q, latents, scale, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla, "indexer_recall", spy)
        model(ids, attention="dense", collect={"indexer_recall"})
    spans = plain_spans(1, 30, 0, None, ids.device)
    expected = reference.select(reference.index_scores(*captured["index"]), spans.lo_BT, spans.hi_BT, 8)
    assert torch.equal(model(ids, collect={"selection"}).selection[0], expected)
