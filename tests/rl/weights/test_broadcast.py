"""Broadcast over real processes (gloo)."""

import pytest
import torch
import torch.distributed as dist
from spawned import run

from glm5.errors import WeightsError
from glm5.rl.weights import BroadcastPublisher, BroadcastSubscriber
from glm5.rl.weights import broadcast as module


def weights(version):
    return {"a": torch.full((1000,), float(version)), "b": torch.full((7, 3), version, dtype=torch.bfloat16)}


def _story():
    module.PIECE = 1024  # several pieces
    if dist.get_rank() == 0:
        publisher = BroadcastPublisher()
        publisher.publish(0, weights(0))
        publisher.publish(3, weights(3))
        with pytest.raises(WeightsError, match="version 2 came after version 3"):
            publisher.publish(2, weights(2))
        with pytest.raises(WeightsError, match="do not fit"):
            publisher.publish(4, {"a": torch.zeros(1)})
        publisher.version = 1  # a publisher gone wrong sends what is old
        publisher.publish(2, weights(2))
        right = module.checksum
        module.checksum = lambda flat, version: right(flat, version) ^ 1
        publisher.publish(5, weights(5))
        module.checksum = right
        publisher.publish(6, weights(6))
        return []
    reader, said = BroadcastSubscriber(), []
    for _ in range(5):
        try:
            version, tensors = reader.receive()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in weights(version).items())
            said.append(version)
        except WeightsError as error:
            said.append(str(error))
    return said


def test_every_rank_receives_and_refuses_the_same():
    results = run(3, _story)
    assert results[1] == results[2]
    assert results[1][:2] == [0, 3] and results[1][4] == 6
    assert "version 2 came after version 3" in results[1][2] and "Version 5 was damaged" in results[1][3]
