"""Servers that are away for a while: asked again after growing pauses, counted and shown, given up after a bound."""

import asyncio
import contextlib
import json
import time
from dataclasses import replace

import httpx
import pytest
from scripted import Chat, ScriptedSource, brief_model
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.engine import SamplingParams
from glm5.envs import EnvironmentFailure
from glm5.errors import ConfigError, FleetError
from glm5.rl import outage
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.executors import engine_servers
from glm5.rl.fleet import EngineState, FleetConfig, FleetStats, SupervisedFleet
from glm5.rl.fleet.external import ServerExecutor
from glm5.rl.fleet.seat import FIRST_DELAY, Seat
from glm5.rl.meter import Meter
from glm5.rl.orchestrator import train_rl
from glm5.rl.patience import Patience
from glm5.rl.records import Ticket
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.serve.backend import Backend
from glm5.serve.backend_api import backend_api
from glm5.train import RunDirectory


class AwayAtFirst(Chat):
    """Its server cannot be reached for the first `times` beginnings, or by a `broken` step."""

    def __init__(self, times, **options):
        super().__init__(**options)
        self.times = times

    def meet(self, what):
        if self.broken == what or (what == "reset" and self.opened <= self.times):
            raise EnvironmentFailure("ws://there cannot be reached", "unreachable")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(outage, "FIRST", 0.01)
    monkeypatch.setattr(outage, "LONGEST", 0.02)


def played(environment, *, timed=True, away=None, **options):
    config = RolloutConfig(max_tokens=50, **options)
    source = ScriptedSource("one<|user|>", "two<|user|>")
    return asyncio.run(play(Ticket("chat", 0), environment, source, config, away=away, timed=timed))


# ---- pauses -------------------------------------------------------------------------------------------------------
def test_pauses_double_up_to_the_longest_and_end_with_the_bound(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    found = []
    for pause in outage.pauses(200.0):
        found.append(pause)
        clock[0] += pause + 1.0  # a try takes its time
    full = [min(0.5 * 2**i, 30.0) for i in range(len(found))]
    assert all(most / 2 <= pause <= most for pause, most in zip(found[:-1], full[:-1], strict=True))
    assert 300.0 - 1e-6 <= clock[0] <= 301.0 + 1e-6  # the last try may have taken it over the bound by itself
    assert len(set(found)) == len(found) > 8
    assert list(outage.pauses(0.0)) == []


# ---- environments -------------------------------------------------------------------------------------------------
def test_an_episode_waits_for_its_server(quick):
    said, environment = [], AwayAtFirst(3)
    rollout = played(environment, away=said.append)
    assert rollout.outcome == "ok" and rollout.reward.value == 1.0 and rollout.task.id == "chat/0/0"
    assert said == ["chat is away and asked again, unreachable: ws://there cannot be reached"] * 3
    assert environment.opened == environment.closed == 4


def test_the_time_of_an_episode_does_not_count_the_outage(monkeypatch):
    monkeypatch.setattr(outage, "FIRST", 0.8)
    monkeypatch.setattr(outage, "LONGEST", 0.8)
    began = time.monotonic()
    rollout = played(AwayAtFirst(5), episode_seconds=1.5)
    assert rollout.outcome == "ok" and time.monotonic() - began > 1.9


def test_it_fails_after_the_bound_and_else_at_once(quick):
    said = []
    rollout = played(AwayAtFirst(10**9), away=said.append, outage_seconds=1.0)
    assert (rollout.outcome, rollout.failure) == ("env_failure", "unreachable: ws://there cannot be reached")
    assert 3 < len(said) < 200
    for environment, options in (
        (AwayAtFirst(10**9), {"outage_seconds": 0.0}),
        (AwayAtFirst(10**9), {"timed": False}),  # deterministic mode looks at no clock
        (AwayAtFirst(0, broken="step"), {}),  # what was done there is gone
        (Chat(broken="reset"), {}),  # a mistake of its own
    ):
        rollout = played(environment, away=said.append, **options)
        assert rollout.outcome == "env_failure" and environment.opened == environment.closed == 1
    assert len(said) < 200
    with pytest.raises(ConfigError, match="outage_seconds is -1"):
        RolloutConfig(outage_seconds=-1.0)


def test_a_run_goes_through_an_outage_and_counts_it(quick, tmp_path):
    glm5.save_model(brief_model(), tmp_path / "parent", speaker_tokenizer())
    config = RLRunConfig(
        parent=tmp_path / "parent", steps=2, rollout=RolloutConfig(max_tokens=6),
        scheduler=SchedulerConfig(mode="sync", groups_per_batch=2, group_size=3, max_running=6),
    )  # fmt: skip
    environment = AwayAtFirst(20, reward=lambda said: len(said[-1]["content"] or "") / 10)
    environment.uniform_groups = "keep"
    run = train_rl(config, [environment], tmp_path / "run")
    assert sum(line["refused"] for line in run.read("speed")) == 20
    assert not any("env_failure" in line["dropped"] or line["requeued"] for line in run.read("metrics"))
    longer = replace(config, steps=3, rollout=replace(config.rollout, outage_seconds=1.0))
    assert train_rl(longer, [environment], tmp_path / "run", resume=True).finished  # a resumed run may change it


# ---- engines ------------------------------------------------------------------------------------------------------
def test_a_seat_is_given_up_by_count_and_by_time():
    servers = FleetConfig(max_restarts=2, outage_seconds=60)
    seat, delays = Seat("0"), []
    for second in range(0, 60, 5):
        delays.append(seat.failed("503", float(second), servers, final=False))
    assert all(FIRST_DELAY * 2 ** min(i, 7) / 2 <= d <= FIRST_DELAY * 2 ** min(i, 7) for i, d in enumerate(delays))
    assert seat.failed("503", 60.0, servers, final=False) is None and "failed (13 times): 503" in seat.given_up
    own = Seat("1")
    assert [own.failed("died", 0.0, replace(servers, outage_seconds=0), final=False) is None for _ in range(3)] == [
        False, False, True,
    ]  # fmt: skip
    assert Seat("2").failed("refused", 0.0, servers, final=True) is None


def refusing(until):
    """A server that is healthy and refuses every request until that many were refused."""
    refused = []

    async def handler(request):
        if request.url.path == "/health":
            return httpx.Response(200)
        if len(refused) < until:
            refused.append(request)
            return httpx.Response(503, json={"error": {"message": "loading"}})
        rows = [[-0.5, 44, None]]
        meta = {"completion_tokens": 1, "finish_reason": {"type": "length"}, "output_token_logprobs": rows}
        return httpx.Response(
            200, headers={"content-type": "text/event-stream"},
            content=f"data: {json.dumps({'output_ids': [44], 'meta_info': meta})}\n\n".encode(),
        )  # fmt: skip

    return httpx.MockTransport(handler), refused


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    glm5.save_model(speaker_model(), path, speaker_tokenizer())
    return path


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_requests_outlive_a_server_that_refuses(directory, seconds):
    """More refusals than an engine of our own may die, and than a request may move."""
    limits = FleetConfig(start_seconds=30, max_restarts=2, max_moves=2, outage_seconds=seconds)
    transport, refused = refusing(6)

    async def story():
        backend = Backend("http://there", directory, backend_api("sglang"), transport=transport)
        fleet = SupervisedFleet(ServerExecutor([backend]), 1, tokenizer=backend.tokenizer, config=limits)
        await fleet.start()
        try:
            stream = fleet.stream([7, 9], SamplingParams(max_tokens=1), session_id="a", priority=0, deadline=None)
            return [delta.token_id async for delta in stream]
        finally:
            with contextlib.suppress(FleetError):
                await fleet.close()

    if seconds:
        assert asyncio.run(story()) == [44] and len(refused) == 6
    else:
        with pytest.raises(FleetError, match=r"died under one request|No engine is left"):
            asyncio.run(story())


def test_a_run_with_servers_waits_as_long_as_for_environments(directory, tmp_path):
    config = RLRunConfig(parent=directory, rollout=RolloutConfig(outage_seconds=77.0))
    RunDirectory.start(tmp_path / "run", stage="rl", config=config, inputs={})
    make = engine_servers(config, ["http://there"], tmp_path / "weights", tmp_path / "run", api="sglang")
    assert make(speaker_model(), speaker_tokenizer(), 0).config.outage_seconds == 77.0


# ---- patience -----------------------------------------------------------------------------------------------------
def test_patience_begins_behind_an_outage_that_is_borne(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter()
    patience = Patience(RLRunConfig(parent=".", patience=10.0, rollout=RolloutConfig(outage_seconds=60.0)), meter)
    up, down = (FleetStats((EngineState("0", there, 3, 1, 0, None),)) for there in (True, False))

    def after(seconds, stats=up):
        while clock[0] < meter.moved_at + seconds:
            clock[0] += 1.0
            waited = patience.outlasted(stats)
        return waited

    assert after(9.0) is None and after(11.0) == 11.0
    meter.away()
    assert after(69.0) is None and after(71.0) == 71.0  # the whole outage, and then as long as ever
    meter.moved()
    assert after(11.0) == 11.0
    assert after(12.0, down) is None and after(69.0) is None and after(71.0, down) == 71.0
    half = tuple(EngineState(str(number), number == 0, 3, 1, 0, None) for number in range(2))
    meter.moved()
    assert after(11.0, FleetStats(half)) == 11.0  # what waits is at the engine that is there
    assert after(12.0, FleetStats(half, waiting=1)) is None and after(71.0, FleetStats(half)) == 71.0
    assert patience.outlasted(FleetStats(())) == 71.0  # nobody samples: nobody is away
    error = patience.exhausted(71.0, 5, down)
    assert "moved for 71 s: 0 rollouts wait for tokens, 5 are in their env" in str(error) and "0 is down" in str(error)


def test_time_in_which_nobody_could_look_does_not_count(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    patience = Patience(RLRunConfig(parent=".", patience=10.0), Meter())

    def after(seconds):
        clock[0] += seconds
        return patience.outlasted(FleetStats(()))

    assert after(3600.0) is None  # a start, Ctrl-Z, a checkpoint
    assert [after(4.0) for _ in range(3)] == [None, None, 12.0]
    patience.meter.moved()
    assert after(4.0) is None and after(3600.0) is None and after(4.0) is None and after(4.0) == 12.0


def test_an_outage_longer_than_the_patience_is_borne(monkeypatch, tmp_path):
    monkeypatch.setattr(outage, "jittered", lambda seconds: 8.0)
    glm5.save_model(brief_model(), tmp_path / "parent", speaker_tokenizer())
    config = RLRunConfig(
        parent=tmp_path / "parent", steps=1, rollout=RolloutConfig(max_tokens=6), patience=6.0,
        scheduler=SchedulerConfig(mode="sync", groups_per_batch=2, group_size=3, max_running=6),
    )  # fmt: skip
    environment = AwayAtFirst(6, reward=lambda said: len(said[-1]["content"] or "") / 10)
    environment.uniform_groups = "keep"
    run = train_rl(config, [environment], tmp_path / "run")
    assert run.finished and sum(line["refused"] for line in run.read("speed")) == 6
