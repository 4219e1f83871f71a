"""Where the indexer runs, and where nothing depends on it."""

from __future__ import annotations

import torch
from tiny import tiny_model

from glm5.model import LatentCache, Replay
from glm5.model.indexer import Indexer

IDS = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_the_indexer_runs_only_where_something_depends_on_it(monkeypatch):
    model, ran = tiny_model(1), []
    forward = Indexer.forward
    monkeypatch.setattr(Indexer, "forward", lambda *arguments: ran.append(1) or forward(*arguments))
    few, layers = IDS[:, : model.config.index_topk], model.config.num_hidden_layers

    def runs(*arguments, **options):
        ran.clear()
        model(*arguments, **options)
        return len(ran)

    assert runs(few) == runs(IDS, attention="dense") == 0
    assert runs(IDS[:, : model.config.index_topk + 1]) == layers
    assert (
        runs(IDS) == runs(few, collect={"indexer_kl"}) == runs(IDS, attention="dense", collect={"indexer_kl"}) == layers
    )
    assert runs(few, cache=LatentCache(model.config, batch=len(IDS), capacity=60)) == layers, (
        "later tokens may leave some out"
    )
    chosen = model(IDS, collect={"selection"}).selection
    assert runs(IDS, replay=Replay(positions=chosen)) == 0
