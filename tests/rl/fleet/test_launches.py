"""A fleet that is closed, or a run that is stopped, while its engines are on their way leaves nothing behind."""

import asyncio
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import fleet_engines
import httpx
import pytest
from sglang_like import sglang_like
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import SingleTurn
from glm5.rl import executors
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.executors import engine_servers
from glm5.rl.fleet import FleetConfig, ProcessExecutor, SupervisedFleet, launches
from glm5.rl.fleet.external import ServerExecutor
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig
from glm5.serve.backend import Backend
from glm5.serve.backend_api import backend_api
from glm5.train import RunDirectory, RunInterrupted

PATIENT = FleetConfig(start_seconds=3600.0, outage_seconds=3600.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    glm5.save_model(speaker_model(), path, speaker_tokenizer())
    return path


def away(_):
    raise httpx.ConnectError("no route")


async def closed_while(fleet, begun):
    """Closes the fleet when `begun()` is true, in the middle of its start."""
    starting = asyncio.create_task(fleet.start())
    while not begun():
        await asyncio.sleep(0.01)
    starting.cancel()
    await fleet.close()


def threads_of(name):
    """Those that do not end. (The last word of a thread comes a moment before its end.)"""
    found = [thread for thread in threading.enumerate() if thread.name.startswith(name)]
    for thread in found:
        thread.join(60)
    return [thread for thread in found if thread.is_alive()]


def test_a_process_that_loads_is_killed(tmp_path):
    started = tmp_path / "started"
    fleet = SupervisedFleet(ProcessExecutor(partial(fleet_engines.endless_engine, started)), 1, config=PATIENT)
    asyncio.run(closed_while(fleet, lambda: started.exists() and started.read_text()))
    assert not Path(f"/proc/{started.read_text()}").exists()
    assert not threads_of("glm5-seat") and not fleet.stats().engines[0].up


def test_a_process_that_is_just_being_forked_is_killed(monkeypatch):
    forked, fork = [], ProcessExecutor.launch
    begun = threading.Event()

    def slow(self, *arguments):
        begun.set()
        time.sleep(0.3)  # the fleet is closed meanwhile
        forked.append(fork(self, *arguments))
        return forked[-1]

    monkeypatch.setattr(ProcessExecutor, "launch", slow)
    monkeypatch.setattr(launches, "END_SECONDS", 60.0)
    fleet = SupervisedFleet(ProcessExecutor(fleet_engines.strict_engine), 1, config=PATIENT)
    asyncio.run(closed_while(fleet, begun.is_set))
    assert len(forked) == 1 and not Path(f"/proc/{forked[0].process_id}").exists()
    assert not threads_of("glm5-seat")


def test_servers_that_do_not_answer_are_asked_no_more(directory):
    asked = []

    def nobody(request):
        asked.append(request.url.path)
        return away(request)

    transport = httpx.MockTransport(nobody)
    backends = [Backend(f"http://{i}", directory, backend_api("sglang"), transport=transport) for i in range(2)]
    fleet = SupervisedFleet(ServerExecutor(backends), 2, config=PATIENT)
    asyncio.run(closed_while(fleet, lambda: len(asked) > 3))
    assert set(asked) == {"/health"} and not threads_of("glm5-seat") and not threads_of("glm5-server-member")


def test_ctrl_c_while_servers_take_weights_stops_the_run_at_once(directory, tmp_path):
    config = RLRunConfig(
        parent=directory, steps=3, rollout=RolloutConfig(max_tokens=6),
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=4),
    )  # fmt: skip
    calm = sglang_like([])

    async def reading_for_ever(request):
        if request.url.path == "/update_weights_from_disk":
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(3600)
        return await calm.handle_async_request(request)

    def make():
        return engine_servers(
            config, ["http://there"], tmp_path / "weights", tmp_path / "run", api="sglang",
            transport=httpx.MockTransport(reading_for_ever), limits=FleetConfig(update_seconds=3600.0),
        )  # fmt: skip

    environment = SingleTurn(fleet_engines.Letters(), uniform_groups="keep")
    with pytest.raises(RunInterrupted, match=r"Stopped after step 1 of 3 of rl; all is saved in .*run"):
        train_rl(config, [environment], tmp_path / "run", make_fleet=make())
    with pytest.raises(RunInterrupted, match=r"Stopped after step 1 of 3"):  # and so when it goes on
        train_rl(config, [environment], tmp_path / "run", make_fleet=make(), resume=True)
    assert [line["step"] for line in RunDirectory.open(tmp_path / "run").read("metrics")] == [0]
    assert train_rl(config, [environment], tmp_path / "run", resume=True).finished


def test_ctrl_c_while_servers_are_awaited_stops_the_run_which_goes_on_with_others(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "FleetConfig", lambda **settings: PATIENT)
    config = RLRunConfig(
        parent=directory, steps=2, rollout=RolloutConfig(max_tokens=6),
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=4),
    )  # fmt: skip
    asked = []

    def nobody(request):
        asked.append(request)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return away(request)

    make = engine_servers(
        config, ["http://there"], tmp_path / "weights", tmp_path / "run", transport=httpx.MockTransport(nobody)
    )  # fmt: skip
    environment = [SingleTurn(fleet_engines.Letters())]
    with pytest.raises(RunInterrupted, match=r"Stopped after step 0 of 2 of rl; all is saved in .*run"):
        train_rl(config, environment, tmp_path / "run", make_fleet=make)
    assert not threads_of("glm5-seat") and not list(tmp_path.rglob("*.partial"))
    assert not RunDirectory.open(tmp_path / "run").finished
    assert train_rl(config, environment, tmp_path / "run", resume=True).finished
