"""Large plain replies: made off the event loop, sent in parts, and held only until they are sent."""

import asyncio
import json
import threading

import pytest
from asgi_client import Call, scope_of
from chat_client import USER
from fastapi.responses import JSONResponse
from held_source import HeldSource, client_in, posted, until
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.engine import SamplingParams
from glm5.serve import Limits, create_app
from glm5.serve.chat import ChatReply
from glm5.serve.encoding import PART_BYTES, LargeResponse, encoded, pieces
from glm5.serve.generation import Generation
from glm5.serve.service import _values

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)


@settings(deadline=None)
@given(values, st.integers(0, 600))
def test_a_large_reply_has_the_same_bytes(value, count):
    body = {"value": value, "many": [value] * count, "none": []}
    assert b"".join(encoded(body)) == JSONResponse(body).body


def test_a_large_reply_is_encoded_piece_by_piece():
    body = {"choices": [{"logprobs": {"content": [{"token": "x", "logprob": -1.0}] * 10_000}}]}
    assert max(map(len, pieces(body))) < 5_000
    assert len(encoded(body)) > 1 and max(map(len, encoded(body))) < PART_BYTES + 5_000


@pytest.mark.parametrize("large", [0, 10**9])
def test_a_large_reply_is_made_off_the_event_loop(monkeypatch, large):
    made = []
    whole = ChatReply.whole
    monkeypatch.setattr("glm5.serve.service.LARGE", large)
    monkeypatch.setattr(ChatReply, "whole", lambda reply: (made.append(threading.current_thread()), whole(reply))[1])

    async def go():
        source = HeldSource()
        source.go_on.set()
        async with client_in(source, Limits()) as client:
            reply = await posted(client)
        assert reply.headers["content-type"] == "application/json"
        assert (
            int(reply.headers["content-length"]) == len(reply.content)
            and reply.json()["usage"]["completion_tokens"] == 1
        )

    asyncio.run(go())
    assert (made == [threading.main_thread()]) is (large > 0)


def test_a_large_reply_holds_its_place_until_its_parts_are_counted(monkeypatch):
    """What a slow reader has not taken is either in the account of what is unsent, or bounded by the places."""
    monkeypatch.setattr("glm5.serve.service.LARGE", 0)
    monkeypatch.setattr("glm5.serve.encoding.PART_BYTES", 10)

    async def go(room):
        source = HeldSource()
        source.go_on.set()
        app = create_app(source, model_name="tiny", limits=Limits(max_unsent_bytes=room))
        body = {"model": "tiny", "messages": USER, "max_tokens": 8}
        call = Call(app, scope_of(), json.dumps(body).encode(), stall=True)
        running = asyncio.create_task(call.run())
        await until(lambda: call.sent)
        if room > 1000:
            await until(lambda: app.state.service.gate.running == 0)
        else:
            await asyncio.sleep(0.05)
            assert app.state.service.gate.running == 1
        call.leave()
        await asyncio.wait_for(running, 120)
        assert app.state.service.gate.running == 0

    asyncio.run(go(100))
    asyncio.run(go(10**6))


def test_a_large_reply_forgets_its_parts_as_they_are_sent():
    forgotten, seen, left = [], [], []

    class Part(bytes):
        """Bytes that say when they are no more."""

        def __del__(self):
            forgotten.append(len(self))

    parts = [Part(b"x" * 10) for _ in range(5)]
    response = LargeResponse(parts, lambda: left.append(len(seen)))
    parts.clear()

    async def take(message):
        if message.get("body"):
            seen.append(len(forgotten))

    async def never():
        await asyncio.Event().wait()

    asyncio.run(response(scope_of(), never, take))
    assert seen == [0, 1, 2, 3, 4] and left == [5]


def test_prompts_that_stand_in_each_sample_make_a_reply_large():
    prompts = [[1] * 1000, [2] * 500]
    for params, values in (({}, 1_500), ({"n": 16}, 24_000), ({"n": 4, "prompt_logprobs": 2}, 24_000)):
        assert _values(Generation(HeldSource(), prompts, SamplingParams(**params))) == values
