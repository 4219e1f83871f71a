"""Shares of time and counts of tokens."""

import asyncio

from scripted import ScriptedSource

from glm5.engine import SamplingParams
from glm5.rl.meter import BusyTime, Meter, Metered


def test_tokens_and_open_requests_are_counted():
    meter = Meter()
    source = Metered(ScriptedSource("</think>4<|user|>", "</think>5<|user|>"), meter)

    async def read():
        asked = {"session_id": "a", "priority": 0, "deadline": None}
        streams = [source.stream([1], SamplingParams(), **asked) for _ in range(2)]
        before = meter.moved_at
        async for _ in streams[0]:
            assert meter.sampling.open == 1
        assert meter.sampling.open == 0 and meter.moved_at >= before
        async for _ in streams[1]:
            break
        streams[1].close()
        assert source.source.streams[1].closed
        return len(source.source.streams[0].deltas)

    count = asyncio.run(read())
    lap = meter.lap()
    assert meter.tokens == count + 1 and lap["tokens_per_second"] > 0
    assert 0 <= lap["sampler_idle"] <= 1 and lap["trainer_idle"] == 1.0
    assert meter.lap()["tokens_per_second"] == 0.0
    assert source.tokenizer is source.source.tokenizer and (source.max_model_len, source.version) == (4096, 0)


def test_busy_time_is_that_of_the_union():
    busy = BusyTime()
    assert busy.seconds == 0.0
    busy.begin()
    busy.begin()
    busy.end()
    assert busy.open == 1
    running = busy.seconds
    busy.end()
    ended = busy.seconds
    assert 0 < running <= ended == busy.seconds
