"""Passes over the paged cache against the model's own pass over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from decoding_steps import needs_extension
from paged import Tokens, feed, scattered
from tiny import tiny_model

from glm5.engine.paged_cache import PagedCache
from glm5.engine.runner import Chunk, DraftChunk, Runner
from glm5.errors import InputError
from glm5.model.decode import Decoder
from glm5.model.fast_steps import FastSteps

IDS = torch.randint(0, 97, (4, 50), generator=torch.Generator().manual_seed(5)).tolist()
LENGTHS = 50, 5, 23, 41


def sequences(block_size: int) -> list[Tokens]:
    rows = [row[:length] for row, length in zip(IDS, LENGTHS, strict=True)]
    return scattered(rows, num_blocks=64, block_size=block_size)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[pytest.param(True, marks=needs_extension), False], ids=["decoder", "modules"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether decoders run, or the modules alone."""
    if not request.param:
        monkeypatch.setattr(FastSteps, "exact_decoder", lambda *arguments: None)
    return request.param


@pytest.mark.parametrize("pattern", [("full", "full"), ("full", "shared")])
@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize(("tokens", "block_size"), [(1, 4), (7, 4), (17, 16), (50, 8), (50, 64)])
def test_scattered_sequences_of_different_lengths_equal_one_pass_each(tokens, block_size, attention, pattern, decoder):
    """Decoding, verification and chunks of a prompt; contexts below and above index_topk in one batch."""
    model = tiny_model(1, indexer_types=pattern)
    cache = PagedCache(model.config, num_blocks=64, block_size=block_size)
    runner = Runner(model, cache, attention=attention)
    rows = sequences(block_size)
    while any(row.done < len(row.ids) for row in rows):
        feed(runner, rows, tokens)
    for row in rows:
        with torch.no_grad():
            wanted = model(torch.tensor([row.ids]), attention=attention).logits[0]
        close(torch.cat(row.logits), wanted)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_what_lies_in_other_blocks_reaches_nothing(attention, decoder):
    """Memory that nobody has written may hold anything; block 0 belongs to neither sequence."""
    model = tiny_model(1)
    cache = PagedCache(model.config, num_blocks=64, block_size=4)
    for pool in (*cache.latents.values(), *cache.keys.values()):
        pool.rows_XW.fill_(float("nan"))
    rows = [Tokens(IDS[0][:30], list(range(20, 28))), Tokens(IDS[1][:5], [40, 30])]
    while any(row.done < len(row.ids) for row in rows):
        feed(Runner(model, cache, attention=attention), rows, 5)
    for row in rows:
        assert torch.cat(row.logits).isfinite().all()


def test_a_step_mixes_prompts_and_decoding_and_keeps_the_logits_asked_for(decoder):
    model = tiny_model(1)
    runner = Runner(model, PagedCache(model.config, num_blocks=64, block_size=4))
    long, short, other, last = sequences(4)
    runner.run([short.next(4, 0), other.next(20, 0), last.next(30, 0)])
    short.done, other.done, last.done = 4, 20, 30
    chunks = [long.next(40, 0), short.next(1, 1), other.next(3, 3), last.next(11, 2)]
    outs = [output.logits_KV for output in runner.run(chunks)]
    assert [tuple(x.shape) for x in outs] == [(0, 97), (1, 97), (3, 97), (2, 97)]
    assert all(x.dtype == torch.float32 for x in outs)
    for row, logits in zip((short, other, last), outs[1:], strict=True):
        with torch.no_grad():
            close(logits, model(torch.tensor([row.ids])).logits[0, -len(logits) :])
    assert runner.run([]) == []


@needs_extension
def test_short_runs_of_tokens_share_the_steps_of_the_decoder(monkeypatch):
    """Prompts as they come in, beside decoding; a run that the modules compute faster stays theirs."""
    model, sizes = tiny_model(1), []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, ids, *rest: sizes.append(len(ids)) or step(self, ids, *rest))
    runner = Runner(model, PagedCache(model.config, num_blocks=64, block_size=4))
    rows = [IDS[0] + IDS[1], IDS[1][:40], IDS[2][:30], IDS[3][:1]]
    sequences = scattered(rows, num_blocks=64, block_size=4)
    outs = runner.run([s.next(len(s.ids), 1) for s in sequences])
    assert sizes == [64, 7]  # 1 + 40 + 30, without the 100
    for row, out in zip(rows, outs, strict=True):
        with torch.no_grad():
            close(out.logits_KV[-1], model(torch.tensor([row])).logits[0, -1])


def test_a_forked_sequence_goes_on_by_itself(decoder):
    model = tiny_model(1)
    cache = PagedCache(model.config, num_blocks=64, block_size=8)
    runner = Runner(model, cache)
    [row] = scattered([IDS[0][:30]], num_blocks=60, block_size=8)
    feed(runner, [row], 20)
    # Two whole blocks are shared, the started one is copied, the next is new.
    fork = Tokens(IDS[0][:20] + IDS[1][20:30], [*row.block_table[:2], 60, 61], 20)
    cache.copy_blocks([(row.block_table[2], 60)])
    for _ in range(10):
        feed(runner, [row, fork], 1)
    for sequence in (row, fork):
        with torch.no_grad():
            wanted = model(torch.tensor([sequence.ids])).logits[0, 20:]
        close(torch.cat(sequence.logits)[-10:], wanted)


@pytest.mark.parametrize("mtp_hidden", ["after_norm", "before_norm"])
@pytest.mark.parametrize("tokens", [1, 19])
def test_states_and_drafts_equal_the_models(tokens, mtp_hidden, decoder, monkeypatch):
    model, drafted = tiny_model(1, mtp_hidden=mtp_hidden), []
    draft = Decoder.draft
    monkeypatch.setattr(Decoder, "draft", lambda *arguments: drafted.append(1) or draft(*arguments))
    cache = PagedCache(model.config, num_blocks=64, block_size=8, draft=True)
    runner = Runner(model, cache)
    rows = scattered([IDS[0][:40], IDS[1][:31]], num_blocks=64, block_size=8)
    whole = []
    for row in rows:
        with torch.no_grad():
            whole.append(model(torch.tensor([row.ids]), collect={"hidden", "mtp"}))
    while live := [i for i, row in enumerate(rows) if row.done + tokens < len(row.ids)]:
        outs = runner.run([rows[i].next(tokens) for i in live], frozenset({"hidden"}))
        chunks = []
        for i, out in zip(live, outs, strict=True):
            done = rows[i].done
            close(out.states_TD, whole[i].hidden[0, done : done + tokens])
            following = rows[i].ids[done + 1 : done + 1 + tokens]
            chunks.append(DraftChunk(out.states_TD, following, done, rows[i].block_table))
            rows[i].done += tokens
        for i, out in zip(live, runner.draft(chunks), strict=True):
            assert out.states_TD.shape == (tokens, 32)
            close(out.logits_KV, whole[i].mtp_logits[0][0, rows[i].done - 1 : rows[i].done])
    assert min(row.done for row in rows) > 15 and bool(drafted) is decoder


def test_a_module_that_changed_drafts_by_its_own_code():
    """The trunk's decoder goes on; the hook on the module is heard."""
    model = tiny_model(1)
    row = Tokens(IDS[0][:12], [0, 1])
    drafts = []
    for _ in range(2):
        runner = Runner(model, PagedCache(model.config, num_blocks=2, block_size=8, draft=True))
        [out] = runner.run([row.next(11)], frozenset({"hidden"}))
        drafts.append(runner.draft([DraftChunk(out.states_TD, row.ids[1:12], 0, row.block_table)])[0].logits_KV)
        model.mtp[0].eh_proj.register_forward_hook(lambda module, args, out: 2 * out)
    assert (drafts[0] - drafts[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (Chunk([], 0, [0], 0), "0 tokens after 0"),
        (Chunk([1], -1, [0], 0), "1 tokens after -1"),
        (Chunk([1], 0, [0], 2), "logits_to_keep is 2"),
        (Chunk([1] * 9, 0, [0, 1], 1), "2 blocks of 4 tokens do not cover"),
        (Chunk([1], 4096, [0] * 2000, 1), "exceeds the model's 4,096 positions"),
        (Chunk([1], 0, [8], 1), "outside the cache's 8"),
        (Chunk([1], 0, [-1], 1), "outside the cache's 8"),
        (Chunk([97], 0, [0], 1), "outside the vocabulary"),
    ],
)
def test_chunks_that_cannot_run_are_refused(chunk, message):
    model = tiny_model(1)
    with pytest.raises(InputError, match=message):
        Runner(model, PagedCache(model.config, num_blocks=8, block_size=4)).run([chunk])


def test_drafts_need_room_for_their_rows():
    model = tiny_model(1)
    with pytest.raises(InputError, match="draft=True"):
        Runner(model, PagedCache(model.config, num_blocks=8)).draft([])
