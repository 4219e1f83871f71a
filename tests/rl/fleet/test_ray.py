"""Engines as Ray actors on a local cluster of three node processes, one of which is killed."""

import asyncio
import os
import sys
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from multiprocessing.connection import Listener
from types import SimpleNamespace

import fleet_engines
import pytest
import torch
from fleet_engines import Letters, play, undisturbed
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import SingleTurn
from glm5.errors import FleetError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.executors import engine_actors
from glm5.rl.fleet import FleetConfig, SupervisedFleet
from glm5.rl.learner import Learner
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig

ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
CONFIG = FleetConfig(start_seconds=120, silence_seconds=20, update_seconds=60)
STORE = 80 * 1024 * 1024


@pytest.fixture
def cluster():
    """A head node, where no engine runs, and two nodes with room for two engines each."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
                   "RAY_ENABLE_METRICS_COLLECTION": "0", "RAY_prestart_worker_first_driver": "0",
                   "RAY_memory_monitor_refresh_ms": "0"}  # fmt: skip
    small = {"object_store_memory": STORE, "include_dashboard": False}
    for tries_left in (2, 1, 0):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, **small)
            nodes = [cluster.add_node(num_cpus=2, object_store_memory=STORE) for _ in range(2)]
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
            break
        except Exception:  # Ray gives a node half a minute to start, however busy the machine is
            ray.shutdown()
            cluster.shutdown()
            if not tries_left:
                raise
    yield nodes, cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ.clear()
    os.environ.update(before)


@asynccontextmanager
async def running(build, size):
    from glm5.rl.fleet.ray import RayExecutor

    fleet = SupervisedFleet(RayExecutor(build), size, tokenizer=speaker_tokenizer(), config=CONFIG)
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()


def test_a_node_is_killed_and_the_run_goes_on(cluster, tmp_path):
    nodes, cluster = cluster
    wanted, new, hold = undisturbed(), speaker_model(seed=1), tmp_path / "hold"

    async def story():
        async with running(partial(fleet_engines.held_engine, hold), 2) as fleet:
            where = [await asyncio.to_thread(ray.get, seat.member.actor.node.remote()) for seat in fleet._seats]
            assert len(set(where)) == 2  # one on each node
            hold.touch()
            work = asyncio.create_task(play(fleet))
            while sum(len(job.said) for job in fleet._jobs.values()) < 12:
                await asyncio.sleep(0.01)
            lost = fleet._seats[0].member
            await asyncio.to_thread(cluster.remove_node, next(n for n in nodes if n.node_id == where[0]), False)
            while fleet._seats[0].member is lost:  # the node takes its time to go
                await asyncio.sleep(0.01)
            hold.unlink()
            assert await work == wanted and fleet.stats().moved > 0

            await fleet.publish(3, new.state_dict())
            while fleet._seats[0].member in (lost, None):  # it comes back on the node that is left
                await asyncio.sleep(0.05)
            member = fleet._seats[0].member
            assert await asyncio.to_thread(ray.get, member.actor.node.remote()) == where[1]
            assert [state.version for state in fleet.stats().engines] == [3, 3]
            alone = fleet_engines.strict_engine()
            alone.update_weights(3, new.state_dict())
            assert await play(fleet) == await play(alone)
            await fleet.publish(4, speaker_model(seed=2).state_dict())
            assert [state.version for state in fleet.stats().engines] == [4, 4] and fleet.version == 4
            alone.close()

    asyncio.run(story())


@pytest.mark.soak
def test_an_actor_whose_engine_failed_is_replaced(cluster, tmp_path, caplog):
    wanted, flag = undisturbed(), tmp_path / "flag"
    flag.touch()

    async def story():
        async with running(partial(fleet_engines.mistaken_engine, flag), 2) as fleet:
            assert await play(fleet) == wanted
            assert sum(state.restarts for state in fleet.stats().engines) == 1 and fleet.stats().moved
            assert "its engine has ended by a mistake of its own (ZeroDivisionError)" in caplog.text

    asyncio.run(story())


@pytest.mark.soak
def test_a_training_run_loses_a_node_and_no_rollout(cluster, tmp_path, monkeypatch):
    """Every sample has one fate, no batch is missing, and the other node takes over."""
    nodes, cluster = cluster
    parent, fleets, step = tmp_path / "parent", [], Learner.step
    glm5.save_model(speaker_model(), parent, speaker_tokenizer())
    config = RLRunConfig(
        parent=parent, steps=5, patience=300.0, rollout=RolloutConfig(max_tokens=6),
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=4, max_running=16, max_staleness=2),
    )  # fmt: skip

    def make(*arguments):
        fleets.append(engine_actors(config, 2, limits=CONFIG)(*arguments))
        return fleets[0]

    def killing(self, batch):
        if self.version == 1:
            member = fleets[0]._seats[0].member
            where = ray.get(member.actor.node.remote())
            cluster.remove_node(next(node for node in nodes if node.node_id == where), False)
        return step(self, batch)

    monkeypatch.setattr(Learner, "step", killing)
    run = train_rl(config, [SingleTurn(Letters())], tmp_path / "run", make_fleet=make)
    lines = run.read("metrics")
    assert run.finished and [line["step"] for line in lines] == list(range(5))
    assert sum(state.restarts for state in fleets[0].stats().engines) >= 1
    for line in lines:
        assert line["sampled"] == line["trained"] + line["requeued"] + sum(line["dropped"].values())
        assert line["max_staleness"] <= 2 and not {"env_failure", "aborted"} & set(line["dropped"])


class Connection:
    """Ray as far as an executor calls it: an actor that is up and never ready. Every call connects, as Ray's do."""

    exceptions = ray.exceptions

    def __init__(self, listener):
        self.listener, self.there, self.calls = listener, True, 0

    def is_initialized(self):
        return self.there

    def called(self, result=None):
        self.calls, self.there = self.calls + 1, True
        return result

    def remote(self, *_):
        return self.called(self)

    def options(self, **_):
        return self

    @property
    def address(self):
        return self

    def future(self):
        done = Future()
        done.set_result((*self.listener.address, b"key"))
        return done

    def put(self, data):
        return self.called(data)

    def kill(self, actor):
        self.called()


def test_after_the_end_nobody_connects_again(monkeypatch):
    """An engine still loads when fleet and connection are closed: the thread that waits for it asks Ray nothing."""
    import glm5.rl.fleet.ray as under_test

    with Listener(("127.0.0.1", 0), authkey=b"key") as listener:
        cluster = Connection(listener)
        monkeypatch.setattr(under_test, "ray", cluster)
        executor = under_test.RayExecutor(fleet_engines.strict_engine)
        fleet = SupervisedFleet(executor, 1, tokenizer=speaker_tokenizer(), config=CONFIG)

        async def story():
            starting = asyncio.create_task(fleet.start())
            theirs = await asyncio.to_thread(listener.accept)
            await fleet.close()
            cluster.there, cluster.calls = False, 0  # ray.shutdown(), which ends the actors
            theirs.close()
            await starting

        asyncio.run(story())
        for thread in threading.enumerate():
            if thread.name.startswith("glm5-seat"):
                thread.join(30)
                assert not thread.is_alive()
        assert not cluster.there and cluster.calls == 0
        for late in (lambda: executor.snapshot(1, {"w": torch.ones(2)}), lambda: executor.update(cluster).result()):
            with pytest.raises(FleetError, match="connection to Ray was closed"):
                late()
        assert not cluster.there


def test_whole_weights_and_adapters_are_taken_by_one_call_the_older_first(monkeypatch):
    """Two calls would run side by side in an actor: the adapters, which are small, would come first and alone."""
    import glm5.rl.fleet.ray as under_test

    monkeypatch.setattr(under_test, "ray", Connection(None))
    executor, taken, calls = under_test.RayExecutor(fleet_engines.strict_engine), [], []
    worker = SimpleNamespace(update=lambda snapshot: taken.append(snapshot.version), engine=SimpleNamespace(version=9))
    engine = SimpleNamespace(_worker=worker)

    def call(*told):
        future = Future()
        future.set_result(under_test.RayEngine.update(engine, *told))
        calls.append(told)
        return SimpleNamespace(future=lambda: future)

    actor = SimpleNamespace(update=SimpleNamespace(remote=call))
    executor.snapshot(3, {"w": torch.ones(1000)})
    executor.snapshot(5, {"lora_a": torch.ones(2)})
    assert executor.update(actor).result() == 9 and taken == [3, 5] and len(calls) == 1
    executor.snapshot(6, {"w": torch.ones(1000)})
    executor.update(actor).result()
    assert taken == [3, 5, 5, 6]
    engine._worker, (told, *data) = SimpleNamespace(update=taken.append), calls[0]
    data[1] = data[1] ^ 1
    with pytest.raises(FleetError, match="Weights of version 5 were damaged"):
        under_test.RayEngine.update(engine, told, *data)


def test_without_a_connection_to_ray_there_is_a_sentence(monkeypatch):
    from glm5.rl.fleet.ray import RayExecutor

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(FleetError, match=r"call ray\.init"):
        RayExecutor(fleet_engines.strict_engine)
