"""Other servers as engines: real `glm5 serve` processes that follow a directory, and a stand-in for SGLang."""

import asyncio
import os
import re
import subprocess
import sys
import threading
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace

import fleet_engines
import httpx
import pytest
import torch
from fleet_engines import PROMPTS, params_of, play, undisturbed
from sglang_like import sglang_like
from speaker import speaker_config, speaker_model, speaker_tokenizer

import glm5
from glm5.engine import StructuredOutputs
from glm5.errors import FleetError, InputError, WeightsError
from glm5.rl.fleet import FleetConfig, SupervisedFleet, external
from glm5.rl.fleet.delivery import Polled, Reloaded
from glm5.rl.fleet.external import ServerExecutor
from glm5.rl.weights import DirectoryPublisher
from glm5.rl.weights.directory import versions
from glm5.rl.weights.mirror import check_unused
from glm5.serve.backend import Backend
from glm5.serve.backend_api import backend_api

CONFIG = FleetConfig(start_seconds=60, silence_seconds=20, max_restarts=0, update_seconds=60)
KEY = "a-key-of-the-fleet"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    glm5.save_model(speaker_model(), path, speaker_tokenizer())
    return path


@asynccontextmanager
async def running(backends, delivery, config=CONFIG):
    fleet = SupervisedFleet(
        ServerExecutor(backends, delivery), len(backends), tokenizer=backends[0].tokenizer, config=config
    )
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()


SLOW = """
import sys, time
from glm5.engine.core import Core
step = Core.step
Core.step = lambda self, now: (time.sleep(0.01), step(self, now))[1]
from glm5.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def serving(directory, weights):
    """A server process of about a hundred steps a second, so that there is time to kill it."""
    command = [sys.executable, "-c", SLOW, "serve", str(directory), "--port", "0", "--strict",
               "--weights-from", str(weights), "--no-log-requests"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLM5_API_KEY": KEY}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)


def test_glm5_servers_take_weights_from_a_directory_and_one_that_is_killed_is_not_missed(directory, tmp_path):
    wanted, new = undisturbed(max_tokens=300), speaker_model(seed=1)
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(directory, tmp_path)) for _ in range(2)]
        for server in servers:
            stack.callback(server.kill)
        urls = [re.search(r"http://\S+", server.stdout.readline())[0] for server in servers]
        backends = [Backend(url, directory, backend_api("generate"), api_key=KEY) for url in urls]

        async def story():
            async with running(backends, Polled(DirectoryPublisher(tmp_path))) as fleet:
                work = asyncio.create_task(play(fleet, max_tokens=300))
                while sum(len(job.said) for job in fleet._jobs.values()) < 100:
                    await asyncio.sleep(0.01)
                moving = sum(job.member is fleet._seats[0].member for job in fleet._jobs.values())
                servers[0].kill()
                assert await work == wanted and fleet.stats().moved == moving > 0
                await fleet.publish(5, new.state_dict())
                alone = fleet_engines.strict_engine()
                alone.update_weights(5, new.state_dict())
                assert await play(fleet) == await play(alone) and fleet.version == 5
                alone.close()

        asyncio.run(story())


def test_sglang_is_interrupted_for_new_weights_and_every_token_has_its_version(directory, tmp_path):
    seen = []
    backend = Backend("http://sglang", directory, backend_api("sglang"), transport=sglang_like(seen, hold_at=150))
    delivery = Reloaded(tmp_path, speaker_config(), speaker_tokenizer())

    async def story():
        async with running([backend], delivery) as fleet:
            stream = fleet.stream(PROMPTS[0], params_of(0, max_tokens=200), session_id="a")
            deltas = [await anext(stream) for _ in range(20)]
            await fleet.publish(3, speaker_model(seed=1).state_dict())
            deltas += [delta async for delta in stream]
            versions = [delta.version for delta in deltas]
            swap = versions.index(3)
            assert versions == [0] * swap + [3] * (200 - swap) and 20 <= swap < 200
            assert [d.token_id for d in deltas] == [40 + (len(PROMPTS[0]) + n) % 200 for n in range(1, 201)]
            assert deltas[-1].finish_reason == "length"
            again = next(body for path, body in seen[1:] if path == "/generate")
            assert again["input_ids"] == PROMPTS[0] + [d.token_id for d in deltas[:swap]]
            assert again["sampling_params"]["max_new_tokens"] == 200 - swap
            reload = next(body for path, body in seen if path == "/update_weights_from_disk")
            loaded = glm5.load_model(reload["model_path"]).state_dict()
            assert all(tensor.equal(loaded[name]) for name, tensor in speaker_model(seed=1).state_dict().items())

    asyncio.run(story())


def test_a_server_that_is_away_during_a_publication_has_the_weights_when_it_is_back(directory, tmp_path):
    calm, refusals = sglang_like([]), [503] * 3

    async def restarting(request):
        if request.url.path == "/update_weights_from_disk" and refusals:
            return httpx.Response(refusals.pop(), text="loading")
        return await calm.handle_async_request(request)

    backend = Backend("http://s", directory, backend_api("sglang"), transport=httpx.MockTransport(restarting))
    delivery = Reloaded(tmp_path, speaker_config(), speaker_tokenizer())

    async def story():
        async with running([backend], delivery, replace(CONFIG, outage_seconds=60.0)) as fleet:
            await fleet.publish(3, speaker_model(seed=1).state_dict())
            stream = fleet.stream(PROMPTS[0], params_of(0, max_tokens=2), session_id="a")
            assert [delta.version async for delta in stream] == [3, 3] and not refusals
        refusals.extend([503] * 3)
        async with running([backend], delivery) as fleet:  # no outage is borne
            with pytest.raises(FleetError, match=r"No engine took weights version 4: .*loading"):
                await fleet.publish(4, speaker_model(seed=1).state_dict())

    asyncio.run(story())


def test_a_server_that_is_not_there_at_the_start_is_given_up_after_the_outage(directory, monkeypatch):
    def away(_):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(external, "START_SECONDS", 0.05)
    backend = Backend("http://t", directory, backend_api("sglang"), transport=httpx.MockTransport(away))
    patient = FleetConfig(start_seconds=3600.0, max_restarts=2, outage_seconds=0.6)

    async def story():
        with pytest.raises(FleetError, match=r"failed \(\d times\): the server at http://t does not answer"):
            async with running([backend], None, patient):
                raise AssertionError

    asyncio.run(story())


def test_a_fleet_begins_without_a_server_that_is_not_there_and_takes_it_when_it_comes(directory, monkeypatch, caplog):
    monkeypatch.setattr(external, "START_SECONDS", 0.05)
    calm, there = sglang_like([]), []

    async def late(request):
        if not there:
            raise httpx.ConnectError("no route")
        return await calm.handle_async_request(request)

    transports = [calm, httpx.MockTransport(late)]
    backends = [Backend(f"http://{i}", directory, backend_api("sglang"), transport=t) for i, t in enumerate(transports)]

    async def story():
        async with running(backends, None, FleetConfig(outage_seconds=3600.0)) as fleet:
            assert [engine.up for engine in fleet.stats().engines] == [True, False]
            assert "engine 1 is not there yet and tried again: the server at http://1 does not answer" in caplog.text
            assert len([d async for d in fleet.stream(PROMPTS[0], params_of(0, max_tokens=3))]) == 3
            there.append(True)
            async with asyncio.timeout(60):
                while not all(engine.up for engine in fleet.stats().engines):
                    await asyncio.sleep(0.01)

    asyncio.run(story())


def test_rollouts_go_on_and_a_closing_fleet_waits_while_weights_are_written(directory, monkeypatch):
    begun, go_on, closed = threading.Event(), threading.Event(), []

    class Slow:
        interrupts = False

        def snapshot(self, version, tensors):
            begun.set()
            assert go_on.wait(60)
            closed.append(list(tensors))  # whoever closed the fleet may not have changed them before

    backend = Backend("http://s", directory, backend_api("sglang"), max_model_len=5000, transport=sglang_like([]))

    async def story():
        async with running([backend], Slow()) as fleet:
            stream = fleet.stream(PROMPTS[0], params_of(0, max_tokens=4000))
            publishing = asyncio.create_task(fleet.publish(3, {"a": torch.zeros(2)}))
            while not begun.is_set():
                await asyncio.sleep(0.01)
            assert len([await anext(stream) for _ in range(20)]) == 20 and not publishing.done()
            publishing.cancel()
            closing = asyncio.create_task(fleet.close())
            await asyncio.wait([closing], timeout=0.2)
            assert not closing.done() and not closed
            go_on.set()
            await closing
            assert closed == [["a"]] and fleet.version == 0

    asyncio.run(story())


def test_models_of_before_a_resumption_are_removed_in_turn_and_seen_by_another_run(tmp_path):
    model = speaker_model()
    for version in (1, 2, 3):
        Reloaded(tmp_path, speaker_config(), speaker_tokenizer()).snapshot(version, model.state_dict())
    assert versions(tmp_path, "model-") == [2, 3]
    again = Reloaded(tmp_path, speaker_config(), speaker_tokenizer())
    for version in (2, 3):  # resumed at 2
        again.snapshot(version, model.state_dict())
        assert versions(tmp_path, "model-") == [2, 3]
    with pytest.raises(WeightsError, match=r"another run \(version 3\)"):
        check_unused(tmp_path)


def test_servers_that_are_away_busy_or_keep_their_weights(directory):
    answers = [httpx.Response(429, json={"error": "busy"})]

    async def busy_once(request):
        return (
            answers.pop() if answers and request.url.path == "/generate" else await calm.handle_async_request(request)
        )

    def away(_):
        raise httpx.ConnectError("no route")

    calm, one_word = sglang_like([]), StructuredOutputs(choice=["yes"])
    api = backend_api("sglang")

    async def story():
        async with running([Backend("http://s", directory, api, transport=httpx.MockTransport(busy_once))], None) as f:
            assert len([d async for d in f.stream(PROMPTS[0], params_of(0, max_tokens=3))]) == 3
            with pytest.raises(InputError, match="not passed on to SGLang"):
                await anext(f.stream(PROMPTS[0], params_of(0, structured_outputs=one_word)))
            with pytest.raises(FleetError, match="keep their weights"):
                await f.publish(1, speaker_model().state_dict())
        gone = Backend("http://t", directory, api, transport=httpx.MockTransport(away))
        with pytest.raises(FleetError, match="http://t does not answer; start it"):
            async with running([gone], None, replace(CONFIG, start_seconds=0.5)):
                raise AssertionError

    asyncio.run(story())
