"""Decoding straight over pools in every format: against the pool's own reading and writing, and the modules' path."""

from __future__ import annotations

from array import array

import pytest
import torch
from paged import feed, scattered
from tiny import tiny_model
from torch import Tensor

import glm5
from glm5.engine.paged_cache import PagedCache
from glm5.engine.pool import Pool, Storage
from glm5.engine.runner import Runner
from glm5.model.decode import Decoder
from glm5.ops import decoding
from glm5.ops.decoding import Matrix, Sequences, Stored

if not decoding.available():
    pytest.skip("the install found no C compiler", allow_module_level=True)

from glm5.ops import _decoding, _lightning

FORMATS: list[Storage] = ["fp32", "bf16", "fp8"]
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(pool: Pool) -> Stored:
    return Stored.of(pool.rows_XW, pool.scales_XG)


def filled(rows_XW: Tensor, storage: Storage) -> Pool:
    pool = Pool(*rows_XW.shape, storage, CPU)
    pool.write(torch.arange(len(rows_XW)), rows_XW)
    return pool


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("width", [1, 64, 80, 130])
def test_rows_are_written_as_the_pool_writes_them(width: int, storage: Storage) -> None:
    rows = random(400, width) * 2.0 ** torch.randint(-140, 100, (400, 1), generator=torch.Generator().manual_seed(1))
    rows[:100] *= 2.0 ** torch.randint(-20, 1, (100, width), generator=torch.Generator().manual_seed(2))
    rows[3], rows[4, 0] = 0, -0.0
    rows[5] = torch.linspace(-448, 448, width)  # ties among e4m3 numbers
    wanted, pool = filled(rows, storage), Pool(400, width, storage, CPU)
    places = torch.arange(400)
    decoding.scatter(Matrix.of(rows), stored(pool), Matrix.of(places))
    assert torch.equal(pool.rows_XW.view(torch.uint8), wanted.rows_XW.view(torch.uint8))
    if pool.scales_XG is not None:
        assert torch.equal(pool.scales_XG, wanted.scales_XG)
    eight = torch.tensor([8])
    for value in (float("nan"), float("inf"), -float("inf")):
        rows[7, -1] = value
        decoding.scatter(Matrix.of(rows).lines(7, 1), stored(pool), Matrix.of(eight))
        wanted.write(eight, rows[7:8])
        read = (p.read(eight, torch.float32) for p in (pool, wanted))
        torch.testing.assert_close(*read, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", range(_decoding.variants()))
@pytest.mark.parametrize("storage", FORMATS)
def test_attention_reads_what_the_pool_reads(storage: Storage, variant: int) -> None:
    pool = filled(random(90, 70), storage)
    wide = pool.read(torch.arange(90), torch.float32)
    places = torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(t))[:33] for t in range(3)])
    places[1, 20:] = -1
    q, y, wanted = random(3 * 2, 70, seed=5), torch.empty(6, 50), torch.empty(6, 50)
    _decoding.use_variant(variant)
    try:
        decoding.attend(Matrix.of(y), Matrix.of(q), stored(pool), Matrix.of(places), 0.2)
        decoding.attend(Matrix.of(wanted), Matrix.of(q), Stored.of(wide), Matrix.of(places), 0.2)
    finally:
        _decoding.use_variant(0)
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("variant", range(_lightning.variants()))
@pytest.mark.parametrize("width", [32, 100, 128])
@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_the_indexer_chooses_as_among_the_same_keys_in_fp32(storage: Storage, width: int, variant: int) -> None:
    pool = filled(random(1600, width), storage)
    table = array("q", torch.randperm(100, generator=torch.Generator().manual_seed(2)).tolist())
    where = Sequences(array("q", [*table.buffer_info(), 1590, *table.buffer_info(), 700]), 16)
    q, w = random(2 * 16, width, seed=3), random(2, 16, seed=4)
    wide, choices = pool.read(torch.arange(1600), torch.float32), []
    for keys in (stored(pool), Stored.of(wide)):
        at_TK = torch.empty(2, 50, dtype=torch.int64)
        decoding.select(Matrix.of(at_TK), Matrix.of(q), Matrix.of(w), keys, where, ask=stored(pool), variant=variant)
        choices.append(at_TK)
    assert torch.equal(*choices)


def decoded(model: glm5.GLM5, storage: Storage, attention: str) -> list[Tensor]:
    ids = torch.randint(0, 97, (3, 45), generator=torch.Generator().manual_seed(5)).tolist()
    cache = PagedCache(model.config, num_blocks=40, block_size=4, storage=storage)
    rows, runner = scattered(ids, num_blocks=40, block_size=4), Runner(model, cache, attention=attention)
    feed(runner, rows, 25)
    while rows[0].done < 45:
        feed(runner, rows, 1)
    return [torch.cat(row.logits[1:]) for row in rows]


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("storage", FORMATS)
def test_the_decoder_and_the_modules_agree_over_every_format(storage, attention, monkeypatch) -> None:
    """Nearly always: what differs in the last bit is now and then rounded to the other neighbour."""
    model, steps = tiny_model(1, std=0.1), []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *arguments: steps.append(1) or step(*arguments))
    ours = decoded(model, storage, attention)
    assert len(steps) == 22  # the prompts' tokens in two blocks, then 20 tokens
    monkeypatch.setattr(glm5.GLM5, "decoder", lambda *_: None)
    wanted = decoded(model, storage, attention)
    assert len(steps) == 22
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).abs().median() < 1e-3 * b.std()


def test_tensors_that_are_no_rows_are_refused() -> None:
    rows, scales = torch.zeros(4, 70, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)
    assert Stored.of(rows, scales).format == 2
    for wrong in ((rows, None), (rows.float(), scales), (rows, scales[:, :1].contiguous()), (rows.T, scales)):
        with pytest.raises(ValueError):
            Stored.of(*wrong)
    with pytest.raises(ValueError):
        Stored.of(torch.zeros(4, 4, dtype=torch.float16))
    tensors = torch.zeros(4, 8), torch.zeros(1, 8), torch.tensor([1])
    keys, x, at = Stored.of(tensors[0]), Matrix.of(tensors[1]), Matrix.of(tensors[2])
    for store in (keys._replace(format=3), keys._replace(format=2), keys._replace(scales=8)):
        with pytest.raises(ValueError, match="format"):
            decoding.scatter(x, store, at)
    table = array("q", [0])
    where = Sequences(array("q", [*table.buffer_info(), 4]), 4)
    with pytest.raises(ValueError, match="format"):
        decoding.select(at, None, None, keys._replace(format=7), where)
    with pytest.raises(ValueError, match="fewer"):
        decoding.select(at, None, None, keys, where, ask=keys._replace(rows=3))
