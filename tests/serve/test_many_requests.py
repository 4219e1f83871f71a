"""Many requests at once with random departures: nothing leaks, and every finished answer is the one given alone."""

import asyncio
import json
import random
import socket

import httpx
import pytest
from scripted import ScriptedStream
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, TokenDelta
from glm5.serve import Limits, create_app

HEAD = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/completions", "/inference/v1/generate")


def body_of(path, number):
    """A request of its own: its words, seed and length depend on its number alone."""
    chance = random.Random(number)
    words = " ".join(chance.choice(["What", "is", "12", "fox", "dog", "the"]) for _ in range(chance.randrange(1, 20)))
    tokens = chance.randrange(1, 24)
    if path == "/inference/v1/generate":
        params = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        return {"token_ids": speaker_tokenizer().encode(words), "sampling_params": params}
    if path == "/v1/completions":
        return {"model": "tiny", "prompt": words, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    messages = [{"role": "user", "content": words}]
    return {"model": "tiny", "messages": messages, "max_tokens": tokens, "temperature": 0}


def said(path, reply):
    """What was answered, without names and times."""
    if path == "/v1/messages":
        return [{key: value for key, value in block.items() if key != "id"} for block in reply["content"]]
    choice = reply["choices"][0]
    if path == "/v1/chat/completions":
        return choice["message"]["content"], choice["message"]["reasoning_content"], choice["finish_reason"]
    return choice["token_ids"], choice["finish_reason"]


async def one(client, path, number, chance):
    """Sends a request; some leave before the answer, some in the middle of a stream. Gives what was answered."""
    body, fate = body_of(path, number), chance.random()
    try:
        if fate < 0.2:  # leaves without waiting
            await asyncio.wait_for(client.post(path, json=body), chance.random() * 0.2)
            return None
        if fate < 0.4:  # leaves in the middle
            async with client.stream("POST", path, json={**body, "stream": True}) as reply:
                async for _ in reply.aiter_bytes():
                    return None
        reply = await client.post(path, json=body)
    except TimeoutError:
        return None
    assert reply.status_code == 200, reply.text
    return said(path, reply.json())


def storm(live_server, count):
    """Runs `count` requests at once over real connections, then every one that was answered once more, alone."""
    engine = Engine(speaker_model(), speaker_tokenizer(), strict=True)
    app = create_app(engine, model_name="tiny", limits=Limits(max_concurrent=64, max_waiting=count))
    url = live_server(app)
    chance = random.Random(0)
    asked = [(PATHS[number % len(PATHS)], number) for number in range(count)]

    async def go():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=3000, limits=limits, trust_env=False) as client:
            answers = await asyncio.gather(*(one(client, path, number, chance) for path, number in asked))
            for (path, number), answer in zip(asked, answers, strict=True):
                if answer is not None:
                    alone = await client.post(path, json=body_of(path, number))
                    assert said(path, alone.json()) == answer, json.dumps(body_of(path, number))
            for _ in range(600):
                health = (await client.get("/health")).json()
                if not health["running"] + health["waiting"]:
                    return answers
                await asyncio.sleep(0.05)
        raise AssertionError(f"requests still run: {health}")

    answers = asyncio.run(go())
    assert sum(answer is not None for answer in answers) > count // 3
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.blocks_used == 0
    engine.close()


def test_forty_requests_with_departures(live_server):
    storm(live_server, 40)


@pytest.mark.soak
def test_a_thousand_requests_with_departures(live_server):
    storm(live_server, 1000)


class LongWinded:
    """Says 6,000 tokens with their likeliest others, some 9 MB as events, and 3 to those who want no details."""

    max_model_len, version = 4096, 0

    def __init__(self):
        self.tokenizer = speaker_tokenizer()

    def stream(self, prompt_ids, params, *, session_id, priority, deadline):
        top = tuple((token, -1.5) for token in range(params.logprobs or 0))
        count = 6000 if top else 3
        return ScriptedStream(
            [TokenDelta(0, 40, -0.5, top, 0, "x", "stop" if n == count - 1 else None) for n in range(count)]
        )


def _unread(connection):
    """Reads what a server has to say to its end; how much it was."""
    connection.settimeout(60)
    size, last = 0, b""
    while not last.endswith(b"0\r\n\r\n"):
        piece = connection.recv(2**20)
        size, last = size + len(piece), (last + piece)[-5:]
    connection.close()
    return size


def test_bodies_of_100_mb_and_readers_that_stall_do_not_stop_others(live_server):
    """Ten clients send far too much or read nothing; the others are answered all the same."""
    app = create_app(LongWinded(), model_name="tiny", limits=Limits(max_concurrent=2))
    url = live_server(app)
    host, port = url.removeprefix("http://").split(":")

    async def too_much(stated):
        reader, writer = await asyncio.open_connection(host, int(port))
        size = b"Content-Length: 104857600" if stated else b"Transfer-Encoding: chunked"
        writer.write(
            b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + size + b"\r\n\r\n"
        )
        piece = b"x" * 2**20
        for _ in range(100):
            writer.write(piece if stated else b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
        if not stated:
            writer.write(b"0\r\n\r\n")
        status = await reader.readline()
        writer.close()
        return status

    def stalls():
        body = json.dumps({"token_ids": [40], "sampling_params": {"logprobs": 20}, "stream": True}).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(HEAD % b"/inference/v1/generate" + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return connection

    async def go():
        stalled = [stalls() for _ in range(5)]
        rude = [asyncio.create_task(too_much(stated)) for stated in (True, False)]
        async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
            replies = await asyncio.gather(*(client.post(PATHS[2], json=body_of(PATHS[2], n)) for n in range(8)))
            assert [reply.status_code for reply in replies] == [200] * 8
            health = (await client.get("/health")).json()
            while health["running"] + health["waiting"]:  # the work for those who read nothing ends as well
                await asyncio.sleep(0.05)
                health = (await client.get("/health")).json()
        for connection in stalled:
            assert _unread(connection) > 5_000_000  # more than the sockets' buffers hold
        assert all(b" 413 " in status for status in await asyncio.gather(*rude))

    asyncio.run(go())
