"""Bodies that never end or are too large, and readers that are slow."""

import asyncio

from asgi_client import Call, scope_of
from chat_client import client_of

from glm5.serve import Limits
from glm5.serve.slow_readers import SendAtLeisure


def test_a_body_that_never_ends_is_answered_with_408():
    client = client_of(limits=Limits(body_seconds=0.05))

    async def never():
        return await asyncio.Event().wait()

    async def go():
        call = Call(client.app, scope_of())
        call.receive = never
        return await call.run()

    call = asyncio.run(go())
    assert call.status == 408 and "did not arrive" in call.json["error"]["message"]


def test_a_refused_body_is_read_to_its_end_so_that_the_refusal_arrives():
    client = client_of(limits=Limits(max_body_bytes=1000))
    parts = iter([b"x" * 900] * 50)

    async def go():
        call = Call(client.app, scope_of())

        async def receive():
            part = next(parts, None)
            return {"type": "http.request", "body": part or b"", "more_body": part is not None}

        call.receive = receive
        return await call.run()

    call = asyncio.run(go())
    assert call.status == 413 and next(parts, None) is None
    assert [message.get("more_body") for message in call.sent] == [None, True, False]


async def _many_parts(scope, receive, send):
    """An app that has much to say and notes when it has said it."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(10):
        await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    scope["ended"].set()


def test_a_slow_reader_does_not_hold_the_work_and_is_cut_off():
    async def go():
        ended = asyncio.Event()
        call = Call(SendAtLeisure(_many_parts, Limits(stall_seconds=0.05)), {**scope_of(), "ended": ended}, stall=True)
        running = asyncio.create_task(call.run())
        await asyncio.wait_for(ended.wait(), 60)
        sent_by_then = len(call.sent)
        await asyncio.wait_for(running, 60)
        return sent_by_then, len(call.sent)

    assert asyncio.run(go()) == (1, 1)


def test_what_is_kept_for_all_slow_readers_is_bounded_and_who_reads_is_served(monkeypatch):
    monkeypatch.setattr("glm5.serve.slow_readers.LITTLE_BYTES", 100)

    async def go():
        layer = SendAtLeisure(_many_parts, Limits(stall_seconds=0.5, max_unsent_total_bytes=1500))
        slow = [Call(layer, {**scope_of(), "ended": asyncio.Event()}, stall=True) for _ in range(3)]
        running = [asyncio.create_task(call.run()) for call in slow]
        await asyncio.sleep(0.1)
        kept, ended = layer.total, sum(call.scope["ended"].is_set() for call in slow)
        reader = await asyncio.wait_for(Call(layer, {**scope_of(), "ended": asyncio.Event()}).run(), 60)
        await asyncio.wait_for(asyncio.gather(*running), 60)
        return kept, ended, len(reader.sent), layer.total

    kept, ended, read, left = asyncio.run(go())
    assert 1500 < kept <= 1500 + 3 * 200 and ended < 3
    assert (read, left) == (12, 0)


def test_what_is_kept_for_a_slow_reader_is_bounded():
    async def go():
        ended = asyncio.Event()
        limits = Limits(stall_seconds=0.2, max_unsent_bytes=300)
        call = Call(SendAtLeisure(_many_parts, limits), {**scope_of(), "ended": ended}, stall=True)
        await asyncio.wait_for(call.run(), 60)
        return ended.is_set()

    assert asyncio.run(go()) is False


def test_everything_reaches_a_reader_in_order():
    async def go():
        call = Call(SendAtLeisure(_many_parts, Limits()), {**scope_of(), "ended": asyncio.Event()})
        return await call.run()

    call = asyncio.run(go())
    assert len(call.sent) == 12 and call.sent[-1]["more_body"] is False
