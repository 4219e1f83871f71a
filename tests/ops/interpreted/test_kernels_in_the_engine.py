"""Steps of the engine's runner with the kernels against the same steps without, from prompts to single tokens."""

from __future__ import annotations

import pytest
import torch
from engine.paged import feed, scattered
from stored import FORMATS
from tiny import tiny_model

from glm5.engine.paged_cache import PagedCache
from glm5.engine.pool import Storage
from glm5.engine.runner import Runner
from glm5.ops import gpu
from glm5.ops.gpu import paged


class Counted:
    """The kernels, and how often each was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def select(self, *given: object) -> torch.Tensor:
        self.asked.append("select")
        return paged.select(*given)

    def attend(self, *given: object) -> torch.Tensor:
        self.asked.append("attend")
        return paged.attend(*given)


@pytest.mark.parametrize(("attention", "storage"), [("dense", "fp8"), *[("sparse", storage) for storage in FORMATS]])
def test_the_engine_computes_the_same_with_them(attention: str, storage: Storage):
    """Sequences of different lengths: in chunks of a prompt, in a few tokens at once, one by one; index_topk is 8.

    Of narrow formats one layer: what a second one stores would depend on how the first one's last bits round.
    """
    layers = 2 if storage == "fp32" else 1
    model = tiny_model(num_hidden_layers=layers)
    ids = [[(7 * i + 3 * j) % 97 for j in range(length)] for i, length in enumerate((43, 5, 24))]
    logits, counted = [], Counted()
    for kernels in (None, counted):
        cache = PagedCache(model.config, num_blocks=40, block_size=4, storage=storage)
        runner, rows = Runner(model, cache, attention=attention), scattered(ids, num_blocks=40, block_size=4)
        runner._in_memory = False  # as on a GPU: no decoder of the CPU
        runner.kernels = kernels
        for tokens in (19, 19, 4, 1):
            feed(runner, rows, tokens)
        logits.append([torch.cat(row.logits) for row in rows])
    for plain_TV, fast_TV in zip(*logits, strict=True):
        torch.testing.assert_close(fast_TV, plain_TV, rtol=1e-4, atol=1e-4)
    assert counted.asked.count("attend") >= 3 * layers  # in every step of few tokens
    assert (counted.asked.count("select") >= 4 * layers) is (attention == "sparse")


def test_strict_mode_keeps_the_plain_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "runs_on", lambda device: True)
    model = tiny_model()
    cache = PagedCache(model.config, num_blocks=4)
    assert Runner(model, cache).kernels is paged
    assert Runner(model, cache, strict=True).kernels is None
