"""Servers that are unwell, start anew or read weights for long: which weights made a token is never in doubt."""

import asyncio
import json
import threading
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from fleet_engines import PROMPTS, params_of
from sglang_like import sglang_like
from speaker import speaker_config, speaker_model, speaker_tokenizer

import glm5
from glm5.errors import FleetError
from glm5.rl.fleet import FleetConfig, SupervisedFleet, external
from glm5.rl.fleet.delivery import Polled, Reloaded
from glm5.rl.fleet.external import ServerExecutor
from glm5.rl.weights import DirectoryPublisher
from glm5.serve.backend import Backend
from glm5.serve.backend_api import backend_api

CONFIG = FleetConfig(start_seconds=60, silence_seconds=20, max_restarts=0, update_seconds=60)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    glm5.save_model(speaker_model(), path, speaker_tokenizer())
    return path


class Server:
    """A stand-in for SGLang that can be made unwell."""

    def __init__(self):
        self.seen, self.health, self.asked = [], 200, 0
        self.reload = asyncio.Event()  # it reads weights until this is set
        self.reload.set()
        self._calm = sglang_like(self.seen)

    async def __call__(self, request):
        if request.url.path == "/health":
            self.asked += 1
            if isinstance(self.health, int):
                return httpx.Response(self.health)
            raise self.health
        if request.url.path == "/update_weights_from_disk":
            await self.reload.wait()
        return await self._calm.handle_async_request(request)

    @property
    def paths(self):
        return [path for path, _ in self.seen]


@asynccontextmanager
async def running(directory, servers, delivery=None, config=CONFIG):
    backends = [
        Backend(
            f"http://s{number}",
            directory,
            backend_api("sglang"),
            max_model_len=5000,
            transport=httpx.MockTransport(server),
        )
        for number, server in enumerate(servers)
    ]
    fleet = SupervisedFleet(
        ServerExecutor(backends, delivery), len(servers), tokenizer=backends[0].tokenizer, config=config
    )
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()


async def until(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.01)


def weights():
    return speaker_model(seed=1).state_dict()


def reloaded(path):
    return Reloaded(path, speaker_config(), speaker_tokenizer())


def reloads(server, member):
    """Lets it go on, from another thread than its own."""
    member._loop.call_soon_threadsafe(server.reload.set)


def test_a_request_that_comes_while_weights_are_read_waits_for_them(directory, tmp_path):
    server = Server()
    server.reload.clear()

    async def story():
        async with running(directory, [server], reloaded(tmp_path)) as fleet:
            publishing = asyncio.create_task(fleet.publish(3, weights()))
            await until(lambda: fleet._seats[0].member._waiting)
            stream = fleet.stream(PROMPTS[0], params_of(0, max_tokens=3), session_id="a")
            left = fleet.stream(PROMPTS[1], params_of(0, max_tokens=3), session_id="b")
            left.close()
            reloads(server, fleet._seats[0].member)
            assert [delta.version async for delta in stream] == [3, 3, 3]
            await publishing
            assert server.paths == ["/update_weights_from_disk", "/generate"]

    asyncio.run(story())


def test_a_server_that_is_silent_while_it_reads_weights_is_not_given_up(directory, tmp_path):
    server = Server()
    server.reload.clear()

    async def story():
        async with running(directory, [server], reloaded(tmp_path)) as fleet:
            member = fleet._seats[0].member
            publishing = asyncio.create_task(fleet.publish(3, weights()))
            await until(lambda: member._waiting)
            server.health = httpx.ReadTimeout("busy")
            asked = server.asked
            await until(lambda: server.asked > asked)
            member._heard -= 1000.0
            assert member.trouble(0.0) is None
            server.health = 200
            reloads(server, member)
            await publishing
            assert fleet.version == 3 and fleet.stats().engines[0].restarts == 0 and member.trouble(0.0) is None

    asyncio.run(story())


def test_requests_that_wait_for_weights_are_not_sent_again_when_the_fleet_is_closed(directory, tmp_path):
    server = Server()
    server.reload.clear()

    async def story():
        async with running(directory, [server], reloaded(tmp_path)) as fleet:
            member = fleet._seats[0].member
            streams = [fleet.stream(PROMPTS[0], params_of(0, max_tokens=400)) for _ in range(3)]
            for stream in streams:
                await anext(stream)
            publishing = asyncio.create_task(fleet.publish(3, weights()))
            await until(lambda: member._waiting)
            sent = server.paths.count("/generate")
            publishing.cancel()
        assert sent == 3 == server.paths.count("/generate") and not asyncio.all_tasks(member._loop)

    asyncio.run(story())


def test_requests_go_on_at_another_server_when_theirs_refuses_weights(directory, tmp_path):
    servers = [Server(), Server()]

    async def refusing(request):
        if request.url.path == "/update_weights_from_disk":
            return httpx.Response(500, text="no room")
        return await servers[0](request)

    async def story():
        async with running(directory, [refusing, servers[1]], reloaded(tmp_path)) as fleet:
            streams = [fleet.stream(PROMPTS[i], params_of(i, max_tokens=4000), session_id=f"s{i}") for i in range(6)]
            for stream in streams:
                await anext(stream)
            before = servers[0].paths.count("/generate")
            await fleet.publish(3, weights())
            moved = fleet.stats().moved
            for stream in streams:
                while (await anext(stream)).version == 0:
                    pass
                stream.close()
            assert servers[0].paths.count("/generate") == before == moved > 0

    asyncio.run(story())


def test_an_answer_is_prepared_outside_the_event_loop_of_its_server(directory, monkeypatch):
    threads, request = [], Backend.request

    def noted(self, *arguments, **named):
        threads.append(threading.current_thread().name)
        return request(self, *arguments, **named)

    monkeypatch.setattr(Backend, "request", noted)

    async def story():
        async with running(directory, [Server()]) as fleet:
            assert len([d async for d in fleet.stream(PROMPTS[0], params_of(0, max_tokens=2))]) == 2
            assert len(threads) == 1 and threads[0] != fleet._seats[0].member._thread.name

    asyncio.run(story())


def test_a_server_that_started_anew_between_two_requests_gets_the_newest_weights_first(
    directory, tmp_path, monkeypatch
):
    monkeypatch.setattr(external, "UNWELL_SECONDS", 0.1)
    server = Server()

    async def story():
        async with running(directory, [server], reloaded(tmp_path), replace(CONFIG, max_restarts=3)) as fleet:
            await fleet.publish(3, weights())
            server.health = httpx.ConnectError("it starts")  # with the weights that its command names
            await until(lambda: fleet._seats[0].member is None)
            server.health = 200
            stream = fleet.stream(PROMPTS[0], params_of(0, max_tokens=2), session_id="a")
            assert [delta.version async for delta in stream] == [3, 3]
            assert server.paths == ["/update_weights_from_disk"] * 2 + ["/generate"]

    asyncio.run(story())


def test_a_server_that_says_that_it_cannot_answer_is_left_at_once(directory, monkeypatch, caplog):
    monkeypatch.setattr(external, "UNWELL_SECONDS", 0.1)
    servers = [Server(), Server()]

    async def story():
        async with running(directory, servers, config=replace(CONFIG, max_restarts=9)) as fleet:
            stream = fleet.stream(PROMPTS[0], params_of(0, max_tokens=4000), session_id="a")
            deltas = [await anext(stream) for _ in range(5)]
            here = next(i for i, server in enumerate(servers) if server.seen)
            servers[here].health = 503
            while not servers[1 - here].seen:
                deltas.append(await anext(stream))
            deltas += [await anext(stream) for _ in range(5)]
            stream.close()
            wanted = [40 + (len(PROMPTS[0]) + n) % 200 for n in range(1, len(deltas) + 1)]
            assert [d.token_id for d in deltas] == wanted
            assert servers[1 - here].paths == ["/generate"] and fleet.stats().moved == 1
            assert f"engine {here} is replaced: http://s{here} answers 503 to /health" in caplog.text

    asyncio.run(story())


def test_a_server_that_is_unwell_from_the_start_is_named_with_its_trouble(directory):
    server = Server()
    server.health = 503

    async def story():
        with pytest.raises(FleetError, match="http://s0 answers 503 to /health; start it, or look at its log"):
            async with running(directory, [server], config=replace(CONFIG, start_seconds=2)):
                raise AssertionError

    asyncio.run(story())


def waiting_for_ever(begun, ended):
    """A server that takes a request and says nothing; notes when it is asked and when it is left."""

    async def handler(request):
        if request.url.path == "/health":
            return httpx.Response(200)
        begun.append(request.url.path)
        try:
            await asyncio.sleep(600)
        finally:
            ended.append(request.url.path)

    return handler


def test_a_request_whose_deadline_passes_before_it_is_taken_ends_and_the_server_stays(directory):
    ended = []

    async def story():
        async with running(directory, [waiting_for_ever([], ended)]) as fleet:
            late = fleet.stream(PROMPTS[0], params_of(0), deadline=1.0)
            assert [delta async for delta in late] == [] and late.finish_reasons == ("abort",)
            await until(lambda: ended)
            assert ended == ["/generate"] and fleet.stats().engines[0].restarts == 0 and fleet.failure is None

    asyncio.run(story())


def test_requests_that_are_given_up_before_they_are_taken_leave_the_server(directory):
    """Far more than a pool of threads could hold."""
    begun, ended = [], []

    async def story():
        async with running(directory, [waiting_for_ever(begun, ended)]) as fleet:
            streams = [fleet.stream(PROMPTS[0], params_of(0)) for _ in range(60)]
            await until(lambda: len(begun) == 60)
            for stream in streams:
                stream.close()
            await until(lambda: len(ended) == 60)

    asyncio.run(story())


def test_an_answer_without_log_probabilities_is_none(directory):
    async def handler(request):
        if request.url.path == "/health":
            return httpx.Response(200)
        said = {"output_ids": [40, 41], "meta_info": {"completion_tokens": 2, "finish_reason": {"type": "length"}}}
        return httpx.Response(200, json=said)

    async def story():
        async with running(directory, [handler]) as fleet:
            with pytest.raises(FleetError, match="gives 0 log-probabilities of 2 tokens"):
                await anext(fleet.stream(PROMPTS[0], params_of(0, max_tokens=2)))

    asyncio.run(story())


def test_a_server_that_names_no_version_cannot_be_polled(directory, tmp_path):
    async def handler(request):
        body = {"data": [{"id": "vllm"}]} if request.url.path == "/v1/models" else {}
        return httpx.Response(200, content=json.dumps(body))

    async def story():
        async with running(directory, [handler], Polled(DirectoryPublisher(tmp_path))) as fleet:
            with pytest.raises(FleetError, match="http://s0 names no weight_version"):
                await fleet.publish(1, weights())

    asyncio.run(story())
