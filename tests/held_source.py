"""A source of tokens that waits until it is told to go on, and what asks the server in front of it."""

import asyncio

import httpx
from chat_client import USER
from speaker import speaker_tokenizer

from glm5.engine import TokenDelta
from glm5.serve import create_app


class HeldSource:
    """Says one token when it is told to, and notes whose turn it was."""

    max_model_len, version = 4096, 0

    def __init__(self):
        self.tokenizer, self.go_on, self.started = speaker_tokenizer(), asyncio.Event(), []
        self.streams = []

    def stream(self, prompt_ids, params, *, session_id, priority, deadline):
        self.started.append((priority, deadline))
        return HeldStream(self)


class HeldStream:
    cached_tokens, prompt_logprobs = 0, None

    def __init__(self, source):
        self.source, self.closed = source, False
        source.streams.append(self)

    def close(self):
        self.closed = True

    async def __aiter__(self):
        await self.source.go_on.wait()
        yield TokenDelta(0, 40, -0.5, (), 0, "x", "stop")


def client_in(source, limits):
    app = create_app(source, model_name="tiny", limits=limits)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60)


async def posted(client, *, headers=None, path="/v1/chat/completions", **fields):
    body = {"model": "tiny", "messages": USER, "max_tokens": 8, **fields}
    return await client.post(path, json=body, headers=headers)


async def until(condition):
    for _ in range(12_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that")
