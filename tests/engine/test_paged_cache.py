"""Storage of the paged cache: bytes, rounding, copies; and what rounding does to logits and selections."""

from __future__ import annotations

import pytest
import torch
from paged import Tokens, feed, scattered
from tiny import tiny_config, tiny_model
from torch import Tensor

import glm5
from glm5.engine.paged_cache import PagedCache
from glm5.engine.pool import Pool, from_fp8, to_fp8
from glm5.engine.runner import Runner
from glm5.engine.views import BatchView, Run
from glm5.errors import InputError

FORMATS = ["fp32", "bf16", "fp8"]


# ---- sizes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "storage", "draft", "wanted"),
    [
        ("glm-5", "fp32", False, (576 * 78 + 128 * 78) * 4),
        ("glm-5", "bf16", False, (576 * 78 + 128 * 78) * 2),
        ("glm-5", "bf16", True, (576 * 79 + 128 * 78) * 2 + 256),  # the MTP layer's own indexer key
        ("glm-5", "fp8", True, (576 + 9) * 79 + (128 + 2) * 79),
        ("glm-5.2", "bf16", True, (576 * 79 + 128 * 22) * 2),  # 21 layers of the trunk select
        ("nano", "fp32", False, (80 * 4 + 32 * 4) * 4),
        ("nano", "fp8", False, (80 + 2) * 4 + (32 + 1) * 4),
    ],
)
def test_bytes_per_token_are_the_closed_form(preset, storage, draft, wanted):
    config = glm5.ModelConfig.from_preset(preset)
    cache = PagedCache(config, num_blocks=2, block_size=4, storage=storage, draft=draft, device="meta")
    assert cache.bytes_per_token == wanted
    assert cache.bytes_per_block == 4 * wanted


def test_settings_that_cannot_be_are_refused():
    config = tiny_config(num_nextn_predict_layers=0)
    with pytest.raises(InputError, match="no MTP module"):
        PagedCache(config, num_blocks=2, draft=True)
    with pytest.raises(InputError, match="storage is 'fp16'; use fp32, bf16, fp8"):
        PagedCache(config, num_blocks=2, storage="fp16")
    with pytest.raises(InputError, match="num_blocks is 0"):
        PagedCache(config, num_blocks=0)
    with pytest.raises(InputError, match="Block 2 is outside"):
        PagedCache(config, num_blocks=2).copy_blocks([(0, 2)])


# ---- rounding ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spread", [1.0, 1e-30, 1e30])
def test_fp8_comes_back_within_its_bound(spread):
    rows = torch.randn(200, 150, generator=torch.Generator().manual_seed(1)) * spread
    rows[:, :64] *= 1000  # a group of its own scale
    rows[0], rows[1, 64:128] = 0, 0
    back = from_fp8(*to_fp8(rows))
    for part in (slice(0, 64), slice(64, 128), slice(128, 150)):
        largest = rows[:, part].abs().amax(1, keepdim=True)
        bound = torch.maximum(rows[:, part].abs() * 2**-4, largest * 2**-17)
        assert ((back[:, part] - rows[:, part]).abs() <= bound).all()
    assert torch.equal(from_fp8(*to_fp8(back)), back)  # what was rounded once stays


def test_fp8_reads_every_byte_as_pytorch_does_and_groups_that_are_not_finite_as_nan():
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    finite = (codes & 0x7F) != 0x7F
    wanted = codes.view(torch.float8_e4m3fn).float() * 2.0**3
    assert torch.equal(from_fp8(codes, torch.full_like(codes, 130))[finite], wanted[finite])
    rows = torch.ones(2, 70)
    rows[0, 3], rows[1, 69] = float("inf"), float("nan")
    back = from_fp8(*to_fp8(rows))
    assert back[0, :64].isnan().all() and back[1, 64:].isnan().all()
    assert (back[0, 64:] == 1).all() and (back[1, :64] == 1).all()


@pytest.mark.parametrize("storage", FORMATS)
def test_blocks_are_copied_whole_and_all_read_before_any_is_written(storage):
    pool = Pool(12, 70, storage, torch.device("cpu"))
    rows = torch.randn(12, 70, generator=torch.Generator().manual_seed(2))
    pool.write(torch.arange(12), rows)
    kept = pool.read(torch.arange(12), torch.float32)
    pool.copy([(0, 2), (2, 0)], 4)
    assert torch.equal(pool.read(torch.arange(12), torch.float32), kept[[8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]])
    torch.testing.assert_close(kept, rows, rtol=2**-4, atol=1e-4)


# ---- what it does to a model ---------------------------------------------------------------------------------------
def prefilled(model: glm5.GLM5, storage: str, ids: list[int]) -> tuple[Runner, Tokens]:
    cache = PagedCache(model.config, num_blocks=20, block_size=8, storage=storage)
    [row] = scattered([ids], num_blocks=20, block_size=8)
    runner = Runner(model, cache)
    runner.run([row.next(len(ids) - 40, 1)])
    row.done = len(ids) - 40
    return runner, row


def chosen(runner: Runner, row: Tokens, queries: tuple[Tensor, Tensor]) -> list[set[int]]:
    """What the first layer's indexer chooses for its last tokens."""
    view = BatchView(runner.cache, [Run(1, len(row.ids) - 1, row.block_table)])
    spans = view.reserve(1, 1, None, None)
    return [
        set(view.select(0, q[None, None], w[None, None], spans, 8)[0, 0].tolist())
        for q, w in zip(*queries, strict=True)
    ]


@pytest.mark.parametrize(("storage", "error", "overlap"), [("bf16", 0.02, 0.95), ("fp8", 0.3, 0.75)])
def test_error_and_overlap_of_selections_against_fp32(storage, error, overlap):
    """The typical error of a logit (a near-tie among experts or keys may fall the other way now and then, and then much
    differs), and the share of chosen keys in common."""
    model = tiny_model(1, std=0.1)
    ids = torch.randint(0, 97, (140,), generator=torch.Generator().manual_seed(5)).tolist()
    exact, rounded = prefilled(model, "fp32", ids), prefilled(model, storage, ids)
    for runner, row in (exact, rounded):
        for _ in range(40):
            feed(runner, [row], 1)
    wanted, found = torch.cat(exact[1].logits), torch.cat(rounded[1].logits)
    assert (found - wanted).abs().median() / wanted.std() < error
    assert not torch.equal(found, wanted)
    g = torch.Generator().manual_seed(3)
    queries = torch.randn(50, 16, 8, generator=g), torch.randn(50, 16, generator=g)
    pairs = list(zip(chosen(*exact, queries), chosen(*rounded, queries), strict=True))
    shared = sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)
    assert overlap < shared < 1


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("storage", FORMATS)
def test_a_bf16_model_runs_over_every_storage(storage, attention):
    model = tiny_model(1, std=0.1, dtype=torch.bfloat16)
    cache = PagedCache(model.config, num_blocks=20, block_size=4, dtype=torch.bfloat16, storage=storage)
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(5)).tolist()
    rows, runner = scattered(ids, num_blocks=20, block_size=4), Runner(model, cache, attention=attention)
    feed(runner, rows, 25)
    while rows[0].done < 40:
        feed(runner, rows, 1)
    for row in rows:
        with torch.no_grad():
            wanted = model(torch.tensor([row.ids]), attention=attention).logits[0].float()
        assert (torch.cat(row.logits) - wanted).abs().median() / wanted.std() < (0.3 if storage == "fp8" else 0.1)
