"""Shared memory: no reader sees half of a version, under any interleaving and between real processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.errors import WeightsError
from glm5.rl.weights import Layout, SharedPublisher, SharedSubscriber, room
from glm5.rl.weights import shared as module

SPAWN = multiprocessing.get_context("spawn")


def weights(version, size=1000):
    """Tensors that name their version in every element."""
    return {"a": torch.full((size,), float(version)), "b": torch.full((7, 3), version, dtype=torch.int64)}


def whole(snapshot):
    values = {float(x) for tensor in snapshot.tensors.values() for x in tensor.view(-1).unique()}
    return values == {float(snapshot.version)}


@pytest.fixture
def publisher():
    publisher = SharedPublisher(Layout.of(weights(0)))
    yield publisher
    publisher.close()


def test_versions_come_once_and_in_order(publisher):
    reader = SharedSubscriber(publisher.name)
    assert reader.newest() is None
    for version in (0, 1, 5):
        publisher.publish(version, weights(version))
        snapshot = reader.newest()
        assert snapshot.version == version and whole(snapshot) and reader.newest() is None
    for version in (5, 4, -1, True):
        with pytest.raises(WeightsError, match=r"versions must grow|at least 0"):
            publisher.publish(version, weights(1))
    with pytest.raises(WeightsError, match="do not fit"):
        publisher.publish(6, weights(6, size=999))
    assert reader.newest() is None and whole(SharedSubscriber(publisher.name).newest())


def test_a_snapshot_is_the_readers_own(publisher):
    publisher.publish(1, weights(1))
    snapshot = SharedSubscriber(publisher.name).newest()
    publisher.publish(2, weights(2))
    publisher.publish(3, weights(3))
    assert whole(snapshot)


def test_damage_is_refused_and_the_next_version_heals(publisher):
    reader = SharedSubscriber(publisher.name)
    publisher.publish(1, weights(1))
    assert reader.newest().version == 1
    publisher.publish(2, weights(2))
    publisher._mapping.slots[publisher._mapping.newest][123] ^= 4
    with pytest.raises(WeightsError, match="Version 2 in shared memory has a wrong checksum"):
        reader.newest()
    assert reader.version == 1
    publisher.publish(3, weights(3))
    assert whole(reader.newest())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_interleaving_shows_a_torn_version(data):
    """The writer is stopped after any number of bytes, and writes on, between the steps of a reader."""
    publisher = SharedPublisher(Layout.of(weights(0, size=40)))
    reader = SharedSubscriber(publisher.name)
    state = {"version": 0, "script": None}

    def writing():
        """One publication in small steps."""
        state["version"] += 1
        version = state["version"]
        slot = 1 - publisher._mapping.newest if version > 1 else 0
        words, flat = publisher._mapping.states[slot], publisher._mapping.slots[slot]
        packed = publisher.layout.pack(weights(version, size=40))
        words[0] = 0
        for start in range(0, len(flat), 64):
            yield
            flat[start : start + 64] = packed[start : start + 64]
        yield
        words[1] = module.checksum(flat, version)
        yield
        words[0] = version + 1
        yield

    def advance(steps):
        for _ in range(steps):
            state["script"] = state["script"] or writing()
            if next(state["script"], "end") == "end":
                state["script"] = None

    class Slots(list):
        """Lets the writer go on whenever the reader is about to copy."""

        def __getitem__(self, slot):
            advance(data.draw(st.integers(0, 12)))
            return super().__getitem__(slot)

    reader._mapping.slots = Slots(reader._mapping.slots)
    reader._mapping.states = Slots(reader._mapping.states)
    last = 0
    for _ in range(10):
        advance(data.draw(st.integers(0, 9)))
        snapshot = reader.newest()
        if snapshot is not None:
            assert whole(snapshot) and snapshot.version > last
            last = snapshot.version
    publisher.close()


def _hammer(name, connection):
    """Reads as fast as it can until version 300."""
    torch.set_num_threads(1)
    reader, seen, torn = SharedSubscriber(name), 0, 0
    connection.send("ready")
    while reader.version is None or reader.version < 300:
        snapshot = reader.newest()
        if snapshot is not None:
            seen += 1
            torn += not whole(snapshot)
    connection.send((seen, torn))


def test_two_processes_hammer():
    publisher = SharedPublisher(Layout.of(weights(0, size=20_000)))
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_hammer, args=(publisher.name, theirs), daemon=True)
    process.start()
    assert ours.poll(120) and ours.recv() == "ready"
    for version in range(301):
        publisher.publish(version, weights(version, size=20_000))
    assert ours.poll(120)
    seen, torn = ours.recv()
    assert torn == 0 and seen >= 1
    process.join(60)
    assert process.exitcode == 0
    publisher.close()


def _publish_forever(connection):
    publisher = SharedPublisher(Layout.of(weights(0, size=2_000_000)))
    version = 0
    while True:
        publisher.publish(version, weights(version, size=2_000_000))
        if version == 1:
            connection.send(publisher.name)
        version += 1


def test_a_publisher_killed_in_the_middle_leaves_the_version_before():
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_publish_forever, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(120)
    name = ours.recv()
    reader = SharedSubscriber(name)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    snapshot = reader.newest()
    assert snapshot.version >= 1 and whole(snapshot)
    reader._mapping.memory.unlink()


def test_more_than_there_is_has_a_sentence_and_leaves_nothing(monkeypatch):
    """Linux would give it, and end the process at the first write behind the end."""
    monkeypatch.setattr(room, "PREFIX", "glm5-too-large-")  # others have theirs meanwhile
    with pytest.raises(WeightsError, match=r"/dev/shm has no room for two versions of the weights, 2,199,023 MB"):
        SharedPublisher(Layout((("a", "uint8", (1 << 40,)),)))
    assert not list(room.FILES.glob(f"{room.PREFIX}*"))


MAKER = """
import os, signal
from multiprocessing import resource_tracker
import torch
from glm5.rl.weights import Layout, SharedPublisher

publisher = SharedPublisher(Layout.of({"a": torch.ones(10)}))
print(publisher.name, flush=True)
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_job_left_behind_is_removed_by_the_next_one(publisher):
    run = subprocess.run([sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True, check=False)
    left, held = (room.FILES / name for name in (run.stdout.strip(), publisher.name))
    assert left.exists() and held.exists()
    SharedPublisher(publisher.layout).close()
    assert left.exists()  # somebody may just be making it
    for path in (left, held):
        os.utime(path, (0, 0))
    SharedPublisher(publisher.layout).close()
    assert not left.exists() and held.exists()


def test_what_is_not_there_has_a_sentence():
    with pytest.raises(WeightsError, match="is gone; its publisher has ended"):
        SharedSubscriber("glm5-nothing")
