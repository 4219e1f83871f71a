"""What waits, and for what: a place, a grammar, the first token. Nothing else stands still meanwhile."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import anthropic
import openai
import pytest
from asgi_client import Call, scope_of
from chat_client import USER
from held_source import HeldSource, client_in, posted, until
from speaker import ScriptedModel, speaker_tokenizer

from glm5.engine import Engine
from glm5.errors import InputError, UnavailableError
from glm5.serve import Limits, create_app


def test_the_queue_is_ordered_by_priority():
    async def go():
        source = HeldSource()
        async with client_in(source, Limits(max_concurrent=1)) as client:
            asked = [asyncio.create_task(posted(client, priority=9))]
            await until(lambda: source.started)
            for number, priority in enumerate((1, 0, 1, -1), 1):
                asked.append(asyncio.create_task(posted(client, priority=priority)))
                waiting = client._transport.app.state.service.gate
                await until(lambda number=number, gate=waiting: gate.waiting == number)
            source.go_on.set()
            assert {reply.status_code for reply in await asyncio.gather(*asked)} == {200}
            refused = await posted(client, priority=10**400)
        return [priority for priority, _ in source.started], refused

    order, refused = asyncio.run(go())
    assert order == [9, -1, 0, 1, 1]
    assert refused.status_code == 400 and "priority" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_the_wait_for_a_place_counts_for_the_deadline(path):
    async def go():
        source = HeldSource()
        async with client_in(source, Limits(max_concurrent=1, deadline_seconds=60)) as client:
            first = asyncio.create_task(posted(client))
            await until(lambda: source.started)
            late = await posted(client, path=path, headers={"X-Request-Timeout": "0.05"})
            assert not first.done()
            patient = asyncio.create_task(posted(client, path=path, headers={"X-Request-Timeout": "40"}))
            await until(lambda: client._transport.app.state.service.gate.waiting == 1)
            await asyncio.sleep(0.2)
            source.go_on.set()
            assert {(await first).status_code, (await patient).status_code} == {200}
        return late, source.started

    late, started = asyncio.run(go())
    assert late.status_code == 504 and "deadline passed before its work began" in late.json()["error"]["message"]
    assert len(started) == 2 and started[1][1] < 40 - 0.2 + 0.01


def test_slow_grammars_stop_nobody_else(monkeypatch):
    """More of them than there are threads and places: the server answers for itself, and so it does others."""
    monkeypatch.setattr("glm5.serve.service.PATIENCE_SECONDS", 0.01)

    async def go():
        engine = Engine(ScriptedModel("</think>42"), speaker_tokenizer())
        release, compiled = threading.Event(), engine.grammars._compiled

        def compile_slowly(outputs, wanted):
            if "slow" in outputs.text:
                assert release.wait(60)
            return compiled(outputs, wanted)

        monkeypatch.setattr(engine.grammars, "_compiled", compile_slowly)

        async def structured(regex, **fields):
            fields |= {"structured_outputs": {"regex": regex}, "chat_template_kwargs": {"enable_thinking": False}}
            reply = await posted(client, max_tokens=20, **fields)
            return reply.json()["choices"][0]["message"]["content"] if reply.is_success else reply.status_code

        async with client_in(engine, Limits(max_concurrent=4)) as client:
            assert await structured("known") == "known"
            slow = [asyncio.create_task(structured(f"slow {number}")) for number in range(50)]
            await until(lambda: client._transport.app.state.service.gate.aside == 50)
            assert (await client.get("/health")).json()["waiting"] == 50
            assert (await client.get("/metrics")).status_code == 200
            assert (await posted(client)).json()["choices"][0]["message"]["content"] == "42"
            assert await structured("known") == "known"
            assert await structured("slow", headers={"X-Request-Timeout": "0.2"}) == 504
            release.set()
            assert await asyncio.gather(*slow) == [f"slow {number}" for number in range(50)]
            health = (await client.get("/health")).json()
            assert (health["running"], health["waiting"]) == (0, 0)
        engine.close()

    asyncio.run(go())


def test_a_grammar_that_is_refused_late_waits_for_no_place(monkeypatch):
    monkeypatch.setattr("glm5.serve.service.PATIENCE_SECONDS", 0.01)
    release = threading.Event()

    def refuse(outputs, wanted):
        assert release.wait(60)
        raise InputError("it did not compile")

    async def go():
        source = HeldSource()
        source.grammars = SimpleNamespace(has=lambda outputs: False, compile=refuse)
        async with client_in(source, Limits(max_concurrent=1)) as client:
            off = {"chat_template_kwargs": {"enable_thinking": False}}
            late = asyncio.create_task(posted(client, structured_outputs={"regex": "a"}, **off))
            other = asyncio.create_task(posted(client))
            await until(lambda: source.started)
            release.set()
            refused = await late
            assert not other.done()
            source.go_on.set()
            assert (await other).status_code == 200
            assert client._transport.app.state.service.gate.running == 0
        return refused

    assert asyncio.run(go()).status_code == 400


def test_who_leaves_while_a_grammar_compiles_is_gone_at_once_with_its_grammar(monkeypatch):
    """Clients that time out and ask again must not fill the queue, nor the compiler's."""
    monkeypatch.setattr("glm5.serve.service.PATIENCE_SECONDS", 0.01)
    begun, ended = [], []

    def slowly(outputs, wanted):
        begun.append(outputs.text)
        while outputs.text != "last" and wanted():
            time.sleep(0.01)
        ended.append(outputs.text)
        raise InputError("it did not compile")

    async def go():
        source = HeldSource()
        source.grammars = SimpleNamespace(has=lambda outputs: False, compile=slowly)
        app = create_app(source, model_name="tiny", limits=Limits(max_concurrent=1, max_waiting=2))
        gate = app.state.service.gate

        def structured(regex):
            body = {"model": "tiny", "messages": USER, "structured_outputs": {"regex": regex},
                    "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
            return Call(app, scope_of(), json.dumps(body).encode())

        for number in range(4):
            call = structured(f"try {number}")
            running = asyncio.create_task(call.run())
            await until(lambda: gate.aside == 1)
            call.leave()
            await asyncio.wait_for(running, 120)
            assert (call.status, gate.running, gate.waiting) == (499, 0, 0)
            await until(lambda: begun == ended)
        last = await asyncio.wait_for(structured("last").run(), 120)
        return last.status

    assert asyncio.run(go()) == 400
    assert begun[-1] == "last"


def test_a_compiler_that_does_not_start_is_no_fault_of_the_client():
    def away(outputs, wanted):
        raise UnavailableError("it did not start")

    async def go():
        source = HeldSource()
        source.grammars = SimpleNamespace(has=lambda outputs: False, compile=away)
        async with client_in(source, Limits()) as client:
            off = {"chat_template_kwargs": {"enable_thinking": False}}
            return await posted(client, structured_outputs={"regex": "a"}, **off)

    answer = asyncio.run(go())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


# ---- signs of life -----------------------------------------------------------------------------------------------
def streamed_call(source, path, **fields):
    app = create_app(source, model_name="tiny", limits=Limits(pause_seconds=0.02))
    body = {"model": "tiny", "max_tokens": 8, "stream": True, **fields}
    return Call(app, scope_of(path), json.dumps(body).encode())


@pytest.mark.parametrize(
    ("path", "fields", "sign"),
    [
        ("/v1/chat/completions", {"messages": USER}, b": keep-alive\n\n"),
        ("/v1/completions", {"prompt": "x"}, b": keep-alive\n\n"),
        ("/v1/messages", {"messages": USER}, b'event: ping\ndata: {"type": "ping"}\n\n'),
    ],
)
def test_a_stream_without_events_gives_signs_of_life(path, fields, sign):
    async def go():
        source = HeldSource()
        call = streamed_call(source, path, **fields)
        running = asyncio.create_task(call.run())
        await until(lambda: [message.get("body") for message in call.sent].count(sign) >= 3)
        source.go_on.set()
        await asyncio.wait_for(running, 120)
        return call

    sent = asyncio.run(go()).sent
    assert [message.get("more_body") for message in sent] == [None, *[True] * (len(sent) - 2), False]
    said = b"".join(message.get("body", b"") for message in sent)
    assert b"x" in said and (b"[DONE]" in said or b"message_stop" in said)


def test_a_client_that_leaves_between_signs_of_life_stops_the_work():
    async def go():
        source = HeldSource()
        call = streamed_call(source, "/v1/chat/completions", messages=USER)
        running = asyncio.create_task(call.run())
        await until(lambda: len(call.sent) > 4)
        assert not source.streams[0].closed
        call.leave()
        await asyncio.wait_for(running, 120)
        said = len(call.sent)
        await asyncio.sleep(0.1)
        assert len(call.sent) == said and call.app.state.service.gate.running == 0
        return source.streams[0].closed

    assert asyncio.run(go())


def test_the_clients_packages_read_over_signs_of_life(live_server):
    source = HeldSource()
    url = live_server(create_app(source, model_name="tiny", limits=Limits(pause_seconds=0.02)))
    threading.Timer(0.3, lambda: source.go_on.set()).start()
    chat = openai.OpenAI(base_url=f"{url}/v1", api_key="x").chat.completions
    said = list(chat.create(model="tiny", messages=USER, stream=True))
    assert said[-1].choices[0].finish_reason == "stop"
    source.go_on = asyncio.Event()
    threading.Timer(0.3, lambda: source.go_on.set()).start()
    with anthropic.Anthropic(base_url=url, api_key="x").messages.stream(
        model="tiny", max_tokens=8, messages=USER
    ) as stream:
        assert stream.get_final_text() == "x"


# ---- the queue -------------------------------------------------------------------------------------------------
STREAMED = [
    ("/v1/chat/completions", {"messages": USER}), ("/v1/responses", {"input": "x", "max_output_tokens": 8}),
    ("/v1/messages", {"messages": USER, "max_tokens": 8}),
]  # fmt: skip


def queued_app(source, **limits):
    """One place; streams that wait longer than an instant begin."""
    return create_app(source, model_name="tiny", limits=Limits(pause_seconds=0.02, max_concurrent=1, **limits))


def call_of(app, path, *headers, **fields):
    return Call(app, scope_of(path, headers=headers), json.dumps({"model": "tiny", "stream": True, **fields}).encode())


@pytest.mark.parametrize(("path", "fields"), STREAMED)
def test_a_stream_that_waits_in_the_queue_begins_and_gives_signs_of_life(path, fields):
    async def go():
        source = HeldSource()
        app = queued_app(source)
        gate, calls = app.state.service.gate, [call_of(app, path, **fields) for _ in range(3)]
        running = [asyncio.create_task(call.run()) for call in calls]
        await until(lambda: all(len(call.sent) >= 4 for call in calls))
        assert [call.status for call in calls] == [200] * 3 and len(source.started) == 1 and gate.waiting == 2
        calls[2].leave()
        await asyncio.wait_for(running[2], 120)
        assert gate.waiting == 1
        source.go_on.set()
        await asyncio.wait_for(asyncio.gather(*running), 120)
        assert (gate.running, gate.waiting, len(source.started)) == (0, 0, 2)
        return b"".join(message.get("body", b"") for message in calls[1].sent)

    said = asyncio.run(go())
    assert b"x" in said and said.count(b"event: error") == 0


@pytest.mark.parametrize(("path", "fields"), STREAMED)
def test_what_is_wrong_before_the_stream_begins_is_a_status_and_afterwards_an_event(path, fields):
    async def go():
        source = HeldSource()
        app = queued_app(source, max_waiting=1)
        first = asyncio.create_task(call_of(app, path, **fields).run())
        await until(lambda: source.started)
        wrong = {k: [{"role": "nobody", "content": "x"}] if k != "max_tokens" else v for k, v in fields.items()}
        late = call_of(app, path, (b"x-request-timeout", b"2"), **fields)
        waiting = asyncio.create_task(late.run())
        await until(lambda: late.sent)
        full = await asyncio.wait_for(call_of(app, path, **fields).run(), 120)
        await asyncio.wait_for(waiting, 120)
        bad = await asyncio.wait_for(call_of(app, path, **wrong).run(), 120)
        source.go_on.set()
        await first
        return late, full.status, bad.status, app.state.service.gate

    late, full, bad, gate = asyncio.run(go())
    said = b"".join(message.get("body", b"") for message in late.sent)
    assert late.status == 200 and b"deadline passed before its work began" in said
    assert (full, bad) == (429, 400) and (gate.running, gate.waiting) == (0, 0)


def test_the_clients_packages_wait_in_the_queue(live_server):
    source = HeldSource()
    url = live_server(queued_app(source))
    chat = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    first = threading.Thread(target=lambda: list(chat.responses.create(model="tiny", input="x", stream=True)))
    first.start()
    while not source.started:
        time.sleep(0.01)
    late = chat.chat.completions.create(
        model="tiny", messages=USER, stream=True, extra_headers={"X-Request-Timeout": "3"}
    )
    with pytest.raises(openai.APIError, match="deadline passed"):
        list(late)
    claude = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
    stream = claude.messages.create(model="tiny", max_tokens=8, messages=USER, stream=True)  # its headers are there
    source.go_on.set()
    assert [event.type for event in stream][-1] == "message_stop"
    first.join()
