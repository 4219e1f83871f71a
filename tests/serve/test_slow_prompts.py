"""A prompt that takes long to prepare keeps neither its own request past its deadline nor the server from its end."""

import asyncio
import threading

import pytest
from held_source import HeldSource, client_in, posted, until

from glm5.serve import Limits


@pytest.fixture
def release():
    """What the slow prompts of a test wait for."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize(
    ("stream", "queued"), [(False, False), (True, False), (True, True)], ids=["plain", "stream", "stream in the queue"]
)
def test_a_slow_prompt_is_given_up_at_the_deadline_and_when_the_server_ends(release, path, stream, queued):
    begun = []

    def slowly(*rest, **more):
        begun.append(path)
        assert release.wait(60)
        return [40]

    async def go():
        source = HeldSource()
        async with client_in(source, Limits(max_concurrent=1, pause_seconds=0.02)) as client:
            service = client._transport.app.state.service
            first = asyncio.create_task(posted(client))
            await until(lambda: source.started)
            if not queued:
                source.go_on.set()
                await first
            service.prompt = slowly
            ask = {"path": path, "stream": stream}
            late = await asyncio.wait_for(posted(client, headers={"X-Request-Timeout": "1"}, **ask), 120)
            before = len(begun)
            last = asyncio.create_task(posted(client, **ask))
            await until(lambda: len(begun) > before)
            service.endings.give_up()
            ended = await asyncio.wait_for(last, 120)
            source.go_on.set()
            await first
            assert (service.gate.running, service.gate.waiting, len(source.started)) == (0, 0, 1)
        return late.status_code, ended.status_code

    assert asyncio.run(go()) == (504, 503)
