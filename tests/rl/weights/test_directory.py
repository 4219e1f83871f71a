"""A directory of versions: chains of deltas, damage, readers at any version, what is removed when."""

import json
import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.errors import WeightsError
from glm5.rl.weights import DirectoryPublisher, DirectorySubscriber
from glm5.rl.weights.directory import versions


def weights(version):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, generator=generator)
    return {"a": base + 1e-5 * version, "b": (base[:21].view(7, 3) + 1e-3 * version).bfloat16()}


def same(snapshot, version):
    return snapshot.version == version and all(torch.equal(snapshot.tensors[n], t) for n, t in weights(version).items())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), min_size=1, max_size=14),
       st.integers(1, 5), st.integers(1, 4))  # fmt: skip
def test_readers_at_any_version_get_the_newest(tmp_path_factory, steps, whole_every, keep):
    path = tmp_path_factory.mktemp("weights")
    publisher, version = DirectoryPublisher(path, whole_every=whole_every, keep=keep), 0
    often, seldom = DirectorySubscriber(path), DirectorySubscriber(path)
    for jump, reads, restarts in steps:
        version += jump
        if restarts:
            publisher = DirectoryPublisher(path, whole_every=whole_every, keep=keep)
        publisher.publish(version, weights(version))
        assert same(often.newest(), version) and often.newest() is None
        if reads:
            assert same(seldom.newest(), version)
    assert same(DirectorySubscriber(path).newest(), version)
    assert len(versions(path)) <= keep + whole_every


def test_deltas_are_written_and_are_smaller(tmp_path):
    publisher = DirectoryPublisher(tmp_path, whole_every=3, keep=10)
    for version in range(5):
        publisher.publish(version, weights(version))
    files = [sorted(f.name for f in (tmp_path / f"v{v:08d}").iterdir()) for v in range(5)]
    whole, change = ["manifest.json", "weights.safetensors"], ["delta.zst", "manifest.json"]
    assert files == [whole, change, change, whole, change]
    sizes = [(tmp_path / f"v{v:08d}" / files[v][-1 if v in (0, 3) else 0]).stat().st_size for v in range(5)]
    assert max(sizes[1], sizes[2], sizes[4]) < 0.7 * sizes[0]


def test_what_is_not_newer_or_does_not_fit_is_refused(tmp_path):
    publisher = DirectoryPublisher(tmp_path)
    publisher.publish(4, weights(4))
    for writer in (publisher, DirectoryPublisher(tmp_path)):
        with pytest.raises(WeightsError, match="version 4 came after version 4"):
            writer.publish(4, weights(4))
    with pytest.raises(WeightsError, match="at least 1"):
        DirectoryPublisher(tmp_path, keep=0)


def test_a_resumed_trainer_publishes_its_versions_anew(tmp_path):
    first = DirectoryPublisher(tmp_path)
    for version in range(4):
        first.publish(version, weights(version))
    again = DirectoryPublisher(tmp_path, after=1)
    again.publish(2, weights(2))
    assert versions(tmp_path)[-1] == 2 and same(DirectorySubscriber(tmp_path).newest(), 2)


def _flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def _change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGE = {
    "a flipped bit in a delta": lambda v: _flip(v / "delta.zst"),
    "a short delta": lambda v: (v / "delta.zst").write_bytes((v / "delta.zst").read_bytes()[:-9]),
    "no delta": lambda v: (v / "delta.zst").unlink(),
    "no manifest": lambda v: (v / "manifest.json").unlink(),
    "a short manifest": lambda v: (v / "manifest.json").write_text("{"),
    "a strange manifest": lambda v: (v / "manifest.json").write_text("[]"),
    "another field": lambda v: _change(v / "manifest.json", colour="red"),
    "a wrong version": lambda v: _change(v / "manifest.json", version=9),
    "a base in the future": lambda v: _change(v / "manifest.json", base=7),
    "another base": lambda v: _change(v / "manifest.json", base=0),
    "a wrong result": lambda v: _change(v / "manifest.json", weights_sha256="0" * 64),
    "other names": lambda v: _change(v / "manifest.json", layout=[["c", "float32", [500]], ["b", "bfloat16", [7, 3]]]),
    "an unknown dtype": lambda v: _change(v / "manifest.json", layout=[["a", "Tensor", [500]]]),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("fresh", [True, False])
def test_damage_is_refused_and_the_reader_keeps_what_it_has(tmp_path, kind, fresh):
    publisher, reader = DirectoryPublisher(tmp_path, whole_every=4), DirectorySubscriber(tmp_path)
    for version in range(2):
        publisher.publish(version, weights(version))
    if not fresh:
        assert same(reader.newest(), 1)
    publisher.publish(2, weights(2))
    DAMAGE[kind](tmp_path / "v00000002")
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"publish (it|a)"):
            reader.newest()
    assert reader.version == (None if fresh else 1)
    shutil.rmtree(tmp_path / "v00000002")
    DirectoryPublisher(tmp_path).publish(3, weights(3))
    assert same(reader.newest(), 3)


def test_a_missing_base_is_named(tmp_path):
    publisher = DirectoryPublisher(tmp_path, whole_every=10, keep=10)
    for version in range(3):
        publisher.publish(version, weights(version))
    shutil.rmtree(tmp_path / "v00000001")
    with pytest.raises(WeightsError, match=r"version 2 need v00000001/manifest.json, which is not there"):
        DirectorySubscriber(tmp_path).newest()


def test_a_reader_beside_a_busy_publisher(tmp_path):
    publisher, failures = DirectoryPublisher(tmp_path, whole_every=2, keep=1), []

    def publish():
        for version in range(40):
            publisher.publish(version, weights(version))

    thread = threading.Thread(target=publish)
    thread.start()
    reader, seen = DirectorySubscriber(tmp_path), []
    while thread.is_alive() or not seen or seen[-1] < 39:
        try:
            snapshot = reader.newest()
        except WeightsError as error:  # removed three times while it was read: possible, and it heals
            failures.append(error)
            continue
        if snapshot is not None:
            assert same(snapshot, snapshot.version)
            seen.append(snapshot.version)
    thread.join()
    assert seen == sorted(set(seen)) and seen[-1] == 39 and len(failures) < 40
