"""Requests that a server refuses while it takes others: they end, the server and all other requests go on."""

import asyncio
import json
from dataclasses import replace

import fleet_engines
import httpx
import pytest
from fleet_engines import PROMPTS, params_of
from sglang_like import sglang_like
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import SingleTurn
from glm5.errors import FleetError, RequestFailed
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.executors import engine_servers
from glm5.rl.fleet import FleetConfig, SupervisedFleet, external, seat
from glm5.rl.fleet.external import ServerExecutor
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig
from glm5.serve.backend import Backend
from glm5.serve.backend_api import backend_api
from glm5.train import RunDirectory

CONFIG = FleetConfig(start_seconds=5, silence_seconds=20, max_restarts=0, update_seconds=60)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    glm5.save_model(speaker_model(), path, speaker_tokenizer())
    return path


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(external, "REFUSED_SECONDS", 0.5)


class Refusing:
    """A stand-in for SGLang that answers 500 to requests that `refused` says."""

    def __init__(self, refused):
        self.refused, self.said = refused, 0
        self._calm = sglang_like([])

    async def __call__(self, request):
        if request.url.path == "/generate" and self.refused(json.loads(request.content)["input_ids"]):
            self.said += 1
            return httpx.Response(500, text="out of memory")
        return await self._calm.handle_async_request(request)


async def with_fleet(directory, servers, story, config=CONFIG):
    backends = [
        Backend(
            f"http://{name}", directory, backend_api("sglang"), max_model_len=5000, transport=httpx.MockTransport(of)
        )
        for name, of in servers.items()
    ]
    executor = ServerExecutor(backends)
    fleet = SupervisedFleet(executor, len(backends), tokenizer=backends[0].tokenizer, config=config)
    try:
        await fleet.start()
        await story(fleet)
    finally:
        await fleet.close()


def test_a_request_that_is_always_refused_ends_alone(directory):
    server = Refusing(lambda ids: ids[:4] == PROMPTS[0])

    async def story(fleet):
        other = fleet.stream(PROMPTS[1], params_of(1, max_tokens=4000), session_id="b")
        before = [await anext(other)]
        with pytest.raises(RequestFailed, match=r"http://s takes other requests, but of this one: .* 500: out of mem"):
            await anext(fleet.stream(PROMPTS[0], params_of(0), session_id="a"))
        assert len([*before, await anext(other)]) == 2 and server.said > 1
        assert fleet.stats().moved == 0 == fleet.stats().engines[0].restarts and fleet.failure is None
        other.close()

    asyncio.run(with_fleet(directory, {"s": server}, story))


def test_a_request_that_is_refused_for_a_while_goes_on_after_its_tokens(directory, monkeypatch):
    refusals = [500, 500]

    def now_and_then(ids):
        return len(ids) > 1 and bool(refusals) and refusals.pop() == 500  # but for the request that could be no smaller

    async def story(fleet):
        deltas = [d async for d in fleet.stream(PROMPTS[0], params_of(0, max_tokens=5), session_id="a")]
        assert [d.token_id for d in deltas] == [40 + len(PROMPTS[0]) + n for n in range(1, 6)] and not refusals
        assert fleet.stats().engines[0].restarts == 0

    monkeypatch.setattr(external, "REFUSED_SECONDS", 60.0)
    asyncio.run(with_fleet(directory, {"s": Refusing(now_and_then)}, story))


def test_a_server_that_refuses_everything_is_left(directory):
    async def story(fleet):
        with pytest.raises(FleetError, match=r"No engine is left: .* 500: out of memory"):
            await anext(fleet.stream(PROMPTS[0], params_of(0), session_id="a"))

    asyncio.run(with_fleet(directory, {"s": Refusing(lambda ids: True)}, story))


def test_what_one_server_refuses_is_taken_by_another(directory, caplog):
    narrow = Refusing(lambda ids: len(ids) > 1)  # has no memory for more

    async def story(fleet):
        deltas = [
            d async for d in fleet.stream(PROMPTS[0], params_of(0, max_tokens=3))
        ]  # the first has as little to do
        assert [d.token_id for d in deltas] == [40 + len(PROMPTS[0]) + n for n in range(1, 4)]
        assert narrow.said and fleet.stats().moved and all(engine.up for engine in fleet.stats().engines)
        assert "http://narrow takes other requests, but of this one: The backend answered 500" in caplog.text

    asyncio.run(with_fleet(directory, {"narrow": narrow, "wide": Refusing(lambda ids: False)}, story))


def test_what_every_server_refuses_ends_alone(directory):
    servers = {name: Refusing(lambda ids: ids[:4] == PROMPTS[0]) for name in "ab"}

    async def story(fleet):
        with pytest.raises(RequestFailed, match="takes other requests, but of this one"):
            await anext(fleet.stream(PROMPTS[0], params_of(0), session_id="a"))
        assert all(server.said for server in servers.values())
        assert len([d async for d in fleet.stream(PROMPTS[1], params_of(1, max_tokens=2), session_id="a")]) == 2

    asyncio.run(with_fleet(directory, servers, story))


async def length(fleet, ids, **options):
    return len([d async for d in fleet.stream(ids, params_of(0, max_tokens=2), **options)])


def test_a_server_that_bears_tiny_requests_only_is_tried_last_after_some(directory, monkeypatch, caplog):
    monkeypatch.setattr(external, "REFUSED_SECONDS", 0.01)
    narrow = Refusing(lambda ids: len(ids) > 2)  # of two with as little to do it is the first

    async def story(fleet):
        for number in range(seat.REFUSALS):
            before = narrow.said
            assert await length(fleet, PROMPTS[number]) == 2 and narrow.said > before
        said, moved, (first, _) = narrow.said, fleet.stats().moved, fleet.stats().engines
        assert await length(fleet, PROMPTS[0]) == await length(fleet, PROMPTS[1], session_id="a") == 2
        assert (narrow.said, moved) == (said, seat.REFUSALS) and fleet.stats().moved == moved
        assert await length(fleet, [7, 9]) == 2  # is as welcome there as before
        assert fleet.stats().engines[0].requests == first.requests + 1 and narrow.said == said
        assert caplog.text.count("engine 0 takes small requests only; those of 4 tokens and more are tried else") == 1
        with monkeypatch.context() as patch:
            patch.setattr(seat, "AVOIDED_SECONDS", 0.0)
            assert await length(fleet, PROMPTS[0]) == 2 and narrow.said > said  # no longer
            narrow.refused = lambda ids: False
            assert await length(fleet, PROMPTS[0]) == 2
        before = fleet.stats().engines[0].requests
        assert await length(fleet, PROMPTS[0]) == 2 and fleet.stats().engines[0].requests == before + 1

    asyncio.run(with_fleet(directory, {"narrow": narrow, "wide": Refusing(lambda ids: False)}, story))


@pytest.mark.parametrize("back", [True, False])
def test_what_one_server_refuses_waits_for_another_that_is_away(directory, monkeypatch, back):
    for name, seconds in (("UNWELL_SECONDS", 0.05), ("REFUSED_SECONDS", 0.01)):
        monkeypatch.setattr(external, name, seconds)
    narrow, wide, away = Refusing(lambda ids: len(ids) > 1), Refusing(lambda ids: False), []

    async def restarting(request):
        if away:
            raise httpx.ConnectError("it starts")
        return await wide(request)

    async def story(fleet):
        away.append(True)
        async with asyncio.timeout(60):
            while all(engine.up for engine in fleet.stats().engines):
                await asyncio.sleep(0.01)
            asked = asyncio.create_task(length(fleet, PROMPTS[0]))
            while not (fleet._waiting or asked.done()):
                await asyncio.sleep(0.01)
        assert narrow.said and not asked.done() and fleet.stats().waiting == 1
        if back:
            away.clear()
            assert await asked == 2
        else:
            fleet.failed(fleet._seats[1], "it never came", final=True)
            with pytest.raises(RequestFailed, match="http://narrow takes other requests, but of this one"):
                await asked

    patient = replace(CONFIG, max_restarts=9, outage_seconds=60.0)
    asyncio.run(with_fleet(directory, {"narrow": narrow, "wide": restarting}, story, patient))


@pytest.mark.parametrize("wide", [True, False])
def test_a_server_that_fails_after_each_token_is_left_and_not_asked_for_every_one(directory, monkeypatch, wide):
    monkeypatch.setattr(external, "REFUSED_SECONDS", 0.01)
    calm, asked = sglang_like([]), {"a": 0, "b": 0}

    def server(name, fails):
        async def one_token(request):
            if request.url.path != "/generate" or json.loads(request.content)["sampling_params"]["max_new_tokens"] == 1:
                return await calm.handle_async_request(request)  # also the request that could be no smaller
            asked[name] += 1
            answer = await calm.handle_async_request(request)
            if not fails:
                return answer
            first = await anext(aiter(answer.stream))
            return httpx.Response(200, headers=answer.headers, content=first + b'data: {"error": "no memory"}\n\n')

        return one_token

    async def story(fleet):
        stream = fleet.stream(PROMPTS[0], params_of(0, max_tokens=12))
        if wide:
            assert len([d async for d in stream]) == 12
        else:
            with pytest.raises(RequestFailed, match=r"takes other requests, but of this one: .* no memory"):
                [d async for d in stream]
        assert 1 < asked["a"] < 8 and asked["b"]

    asyncio.run(with_fleet(directory, {"a": server("a", True), "b": server("b", not wide)}, story))


def test_each_try_is_told_the_time_that_is_left(directory, monkeypatch):
    monkeypatch.setattr(external, "BUSY_SECONDS", 0.01)
    monkeypatch.setattr(external, "REFUSED_SECONDS", 60.0)
    answers, told, request, calm = [500, 429], [], Backend.request, sglang_like([])

    def noted(self, prompt_ids, params, **options):
        told.extend([options["deadline"]] * (len(prompt_ids) > 1))  # not of the request that could be no smaller
        return request(self, prompt_ids, params, **options)

    async def server(request):
        whole = request.url.path == "/generate" and len(json.loads(request.content)["input_ids"]) > 1
        return httpx.Response(answers.pop()) if whole and answers else await calm.handle_async_request(request)

    monkeypatch.setattr(Backend, "request", noted)

    async def story(fleet):
        assert await length(fleet, PROMPTS[0], deadline=500.0) == 2 and not answers
        assert len(told) == 3 and 500.0 >= told[0] > told[1] > told[2] > 0

    asyncio.run(with_fleet(directory, {"s": server}, story))


def test_a_run_goes_on_without_the_episodes_that_its_server_fails_at(directory, tmp_path):
    config = RLRunConfig(
        parent=directory, steps=2, rollout=RolloutConfig(max_tokens=6, outage_seconds=0.0),
        scheduler=SchedulerConfig(mode="sync", groups_per_batch=2, group_size=4, max_running=8, max_attempts=1),
    )  # fmt: skip
    environment = SingleTurn(fleet_engines.Letters(), uniform_groups="keep")
    tokenizer, refused = speaker_tokenizer(), []

    def one_task(ids):
        third = "3" in tokenizer.decode(ids)
        refused.extend([ids] * third)
        return third

    make = engine_servers(
        config, ["http://s"], tmp_path / "weights", tmp_path / "run", api="sglang",
        transport=httpx.MockTransport(Refusing(one_task)),
    )  # fmt: skip
    assert train_rl(config, [environment], tmp_path / "run", make_fleet=make).finished and refused
    run = RunDirectory.open(tmp_path / "run")
    text = (run.path / "journal").read_text()
    assert "engine: http://s takes other requests, but of this one: The backend answered 500: out of memory" in text
    assert [line["step"] for line in run.read("metrics")] == [0, 1]
