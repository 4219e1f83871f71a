"""Many requests at once through the engine's own thread: aborts, slow readers, deadlines, asyncio, closing."""

import asyncio
import gc
import random
import threading
import time
from dataclasses import replace

import pytest
from plain import GREEDY, ToyModel, run, submit, toy_core
from speaker import speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.engine.core import Core
from glm5.errors import InputError, UnavailableError


def wait_for(condition):
    for _ in range(24_000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came true")


def idle(engine):
    """Nothing runs, nothing waits, and no block is held."""
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def requests_of(count, seed=0):
    """Prompts with shared beginnings, greedy and sampled, some with several completions."""
    pick = random.Random(seed)
    roots = [[pick.randrange(320) for _ in range(pick.randrange(5, 60))] for _ in range(5)]
    for i in range(count):
        prompt = pick.choice(roots)[: pick.randrange(1, 60)] + [pick.randrange(320) for _ in range(pick.randrange(9))]
        params = SamplingParams(
            n=pick.choice([1, 1, 1, 2, 3]), seed=i, temperature=pick.choice([0.0, 1.0]), ignore_eos=True,
            max_tokens=pick.randrange(1, 20),
        )  # fmt: skip
        yield prompt or [7], params


async def crowd(engine, requests, seed=0):
    """Runs all at once; readers pause at random and a third leaves early. The answers of those who stayed."""
    pick = random.Random(seed)

    async def one(prompt, params, leaves_after, pause):
        stream, got = engine.stream(prompt, params), []
        async for delta in stream:
            got.append(delta)
            if len(got) == leaves_after:
                await stream.aclose()
                return None
            if pause and len(got) % 7 == 0:
                await asyncio.sleep(0.001)
        return [[(d.token_id, d.logprob) for d in got if d.index == i] for i in range(params.n)]

    readers = [
        one(prompt, params, pick.randrange(1, 12) if pick.random() < 0.33 else 0, pick.random() < 0.2)
        for prompt, params in requests
    ]
    return await asyncio.gather(*readers)


def check_crowd(count):
    engine = Engine(ToyModel(), num_blocks=48, block_size=4, max_num_seqs=24, max_num_batched_tokens=64)
    requests = list(requests_of(count))
    answers = asyncio.run(asyncio.wait_for(crowd(engine, requests), 3000))
    wait_for(lambda: idle(engine))
    engine._core.scheduler.check()
    assert sum(answer is not None for answer in answers) > count // 2
    single = Engine(ToyModel(), num_blocks=200, block_size=4, max_num_seqs=1, enable_prefix_caching=False)
    for (prompt, params), answer in zip(requests, answers, strict=True):
        if answer is not None:
            (output,) = single.generate([prompt], params)
            assert answer == [list(zip(c.token_ids, c.logprobs, strict=True)) for c in output.outputs]
    assert engine.stats().preemptions > 0 and engine.stats().cached_tokens > 0


def test_200_concurrent_requests_with_random_aborts_lose_no_block_and_answer_as_alone():
    check_crowd(200)


@pytest.mark.soak
def test_1000_concurrent_requests_with_random_aborts_lose_no_block_and_answer_as_alone():
    check_crowd(1000)


def test_asyncio_iteration_uses_no_thread_per_request():
    engine = Engine(ToyModel())

    async def read(i):
        return [delta.token_id async for delta in engine.stream([i], replace(GREEDY, max_tokens=40))]

    async def all_of_them():
        before = threading.active_count()
        tasks = [asyncio.create_task(read(i)) for i in range(30)]
        await asyncio.sleep(0.01)
        assert threading.active_count() <= before + 1
        return await asyncio.gather(*tasks)

    answers = asyncio.run(all_of_them())
    outputs = engine.generate([[i] for i in range(30)], replace(GREEDY, max_tokens=40))
    assert answers == [list(output.token_ids) for output in outputs]


def test_a_reader_that_stops_reading_neither_holds_others_up_nor_fills_the_memory(monkeypatch):
    monkeypatch.setattr("glm5.engine.engine.BUFFERED_TOKENS", 8)
    engine = Engine(ToyModel(), max_num_seqs=1)
    slow = engine.stream([1], replace(GREEDY, max_tokens=100))
    first = next(slow)
    assert [len(o.token_ids) for o in engine.generate([[2], [3]], GREEDY)] == [12, 12]
    assert len(slow._request.sequences[0].deltas) < 20
    tokens = (first.token_id, *(delta.token_id for delta in slow))
    assert tokens == engine.generate([[1]], replace(GREEDY, max_tokens=100))[0].token_ids
    assert slow.finish_reasons == ("length",)


def test_a_request_ends_at_its_deadline():
    model = ToyModel()
    engine = Engine(model)
    forward = model.forward
    model.forward = lambda *args, **kwargs: (time.sleep(0.01), forward(*args, **kwargs))[1]
    stream = engine.stream([1], replace(GREEDY, max_tokens=500), deadline=1.0)
    assert 0 < len(list(stream)) < 200
    assert stream.finish_reasons == ("abort",)
    late = engine.stream([1], GREEDY, deadline=1e-9)
    assert list(late) == [] and late.finish_reasons == ("abort",)
    wait_for(lambda: idle(engine))


def test_closing_or_dropping_a_stream_gives_everything_back():
    engine = Engine(ToyModel())
    endless = replace(GREEDY, max_tokens=500, n=2)
    stream = engine.stream([1, 2, 3], endless)
    next(stream)
    stream.close()
    assert list(stream) == [] and stream.finish_reasons == ("abort", "abort")
    wait_for(lambda: idle(engine))
    stream = engine.stream([1, 2, 3], endless)
    next(stream)
    del stream
    gc.collect()
    wait_for(lambda: idle(engine))


def test_a_closed_engine_ends_its_requests_and_its_thread():
    model = ToyModel()
    engine = Engine(model)
    forward = model.forward
    model.forward = lambda *args, **kwargs: (time.sleep(0.01), forward(*args, **kwargs))[1]
    stream = engine.stream([1], replace(GREEDY, max_tokens=500))
    next(stream)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    engine.close()
    reader.join(60)
    assert not reader.is_alive() and stream.finish_reasons == ("abort",) and idle(engine)
    with pytest.raises(InputError, match="engine is closed"):
        engine.generate([[1]])
    engine.close()


def test_the_thread_ends_without_work_and_the_next_request_starts_it_again(monkeypatch):
    monkeypatch.setattr("glm5.engine.engine.IDLE_SECONDS", 0.02)
    engine = Engine(ToyModel())
    first = engine.generate([[1]], GREEDY)
    wait_for(lambda: engine._thread is None)
    assert engine.generate([[1]], GREEDY)[0].token_ids == first[0].token_ids


def test_a_failed_request_raises_in_its_reader_and_the_engine_goes_on():
    engine = Engine(ToyModel(), speaker_tokenizer())
    forward, engine.model.forward = engine.model.forward, lambda *args, **kwargs: 1 / 0
    stream = engine.stream([1])
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert list(stream) == []
    with pytest.raises(ZeroDivisionError):
        engine.generate([[1], [2]])
    engine.model.forward = forward
    assert len(engine.generate([[1]], GREEDY)[0].token_ids) == 12 and idle(engine)


def test_a_mistake_of_the_engine_itself_ends_every_request_and_the_next_ones_run(monkeypatch):
    engine = Engine(ToyModel())
    stream = engine.stream([1], replace(GREEDY, max_tokens=500))
    next(stream)
    scheduler = engine._core.scheduler
    with monkeypatch.context() as broken:
        broken.setattr(scheduler, "schedule", lambda: scheduler.running.clear() or 1 / 0)  # and its lists disagree
        for reader in (lambda: list(stream), lambda: engine.generate([[2]], GREEDY)):
            with pytest.raises(ZeroDivisionError):
                reader()
    assert idle(engine)
    assert len(engine.generate([[1]], GREEDY)[0].token_ids) == 12
    scheduler.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_between_two_steps_ends_every_request_and_the_engine_says_so(monkeypatch):
    monkeypatch.setattr("glm5.engine.engine.BUFFERED_TOKENS", 8)
    engine = Engine(ToyModel())
    streams = [engine.stream([i], replace(GREEDY, max_tokens=100)) for i in (1, 2)]
    assert next(streams[0]) and engine.failure is None
    with monkeypatch.context() as broken:
        broken.setattr(Core, "next_deadline", property(lambda core: 1 / 0))  # asked when both are full
        wait_for(lambda: engine.failure)
        for stream in streams:
            with pytest.raises(ZeroDivisionError):
                list(stream)
    assert idle(engine)
    for request in (lambda: engine.generate([[1]], GREEDY), lambda: engine.stream([1])):
        with pytest.raises(UnavailableError, match=r"mistake of its own \(ZeroDivisionError\); make a new one"):
            request()
    engine.close()


def test_a_thread_that_cannot_be_started_is_the_callers_error_and_the_next_request_tries_again(monkeypatch):
    engine = Engine(ToyModel())

    def none_left(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as crowded:
        crowded.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError, match="can't start"):
            engine.generate([[1]], GREEDY)
    assert idle(engine) and len(engine.generate([[1]], GREEDY)[0].token_ids) == 12


def test_a_reader_whose_callback_raises_keeps_no_other_from_its_end():
    engine = Engine(ToyModel(), threaded=False)
    readers = [engine.stream([i], GREEDY) for i in range(3)]
    readers[0]._mailbox.call_when_ready(lambda: 1 / 0)
    engine.close()
    assert [reader.finish_reasons for reader in readers] == [("abort",)] * 3


def test_stats_count_what_was_done():
    engine = Engine(ToyModel(), num_blocks=50, block_size=4, version=4)
    engine.generate([[1, 2, 3, 4, 5]] * 2, replace(GREEDY, max_tokens=4))
    stats = engine.stats()
    assert (stats.sampled_tokens, stats.computed_tokens + stats.cached_tokens) == (8, 16)
    assert (stats.blocks_total, stats.blocks_used, stats.version, stats.running) == (50, 0, 4, 0)


def test_the_prefix_caches_share_counts_each_prompt_once_and_no_sampled_token():
    core = toy_core(num_blocks=11, block_size=4)
    prompt = list(range(9))
    first = submit(core, prompt, replace(GREEDY, n=2, temperature=1.0, seed=1))
    run(core)
    assert (core.stats(0).prompt_tokens, core.stats(0).cached_prompt_tokens) == (9, 0)
    requests = [submit(core, prompt + list(range(i)), replace(GREEDY, max_tokens=20)) for i in (0, 8, 8)]
    run(core)
    stats, counted = core.stats(0), [first, *requests]
    assert stats.preemptions > 0  # and what is computed again, or found again, is not counted again
    assert stats.prompt_tokens == sum(len(r.sequences[0].prompt_ids) for r in counted) == 9 + 9 + 17 + 17
    assert stats.cached_prompt_tokens == sum(r.cached_tokens for r in counted) == 0 + 8 + 8 + 16
