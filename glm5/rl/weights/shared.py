"""Weights in shared memory: one mapping, two slots. One process writes, any number on the machine read.

    magic, bytes of the layout | layout (JSON) | 2 x (version + 1, checksum) | slot 0 | slot 1

A new version goes into the slot that does not hold the newest. Its version word is 0 while it is written and set at
the end: since versions only grow, the word is the generation counter of a seqlock, and the writer never waits for a
reader. A reader copies the newest slot out in one call and takes the copy only if the word is the same as before and
the checksum over version and bytes is right; otherwise it looks again. So nobody sees half of one version and half of
another, whatever the processor reorders and wherever the writer is killed.

Readers must be processes that the publisher started with `multiprocessing`: they share its resource tracker, which
removes the mapping when all of them are killed (and `room.py`, when it is killed itself).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from multiprocessing.shared_memory import SharedMemory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glm5.errors import WeightsError
from glm5.rl.weights.layout import ALIGNMENT, Layout, check_newer, checksum
from glm5.rl.weights.room import Room

MAGIC = 0x35_6D_6C_67_73_77_30_31
TRIES = 100
"""Looks at a slot whose checksum is wrong, a millisecond apart, before it counts as damaged."""


class Snapshot(NamedTuple):
    """One version; the tensors are the reader's own."""

    version: int
    tensors: dict[str, Tensor]


class _Mapping:
    """The parts of the mapping as arrays."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        whole = torch.frombuffer(memory.buf, dtype=torch.uint8)
        magic, size = (int(word) for word in whole[:16].view(torch.int64))
        if magic != MAGIC:
            raise WeightsError(f"The shared memory {memory.name} holds no weights; give the publisher's own name.")
        self.layout = Layout.from_bytes(bytes(whole[16 : 16 + size].numpy()))
        start = _aligned(16 + size)
        # One store of eight bytes each: a counter is never seen half written.
        self.states: list[np.ndarray] = [whole[start + 64 * slot :][:16].view(torch.int64).numpy() for slot in (0, 1)]
        start += 128
        length = self.layout.num_bytes
        self.slots = [whole[start + slot * length :][:length] for slot in (0, 1)]

    @property
    def newest(self) -> int:
        """The slot with the newest version."""
        return int(self.states[1][0] > self.states[0][0])

    def close(self) -> None:
        """Lets the memory go."""
        self.states, self.slots = [], []
        try:
            self.memory.close()
        except BufferError:  # somebody still looks at it; the end of the process closes it
            pass


class SharedPublisher:
    """The writer. `name` is what a `SharedSubscriber` needs."""

    def __init__(self, layout: Layout) -> None:
        described = layout.to_bytes()
        size = _aligned(16 + len(described)) + 128 + 2 * layout.num_bytes
        self._room = Room(size)
        memory = self._room.memory
        header = torch.tensor([MAGIC, len(described)], dtype=torch.int64).view(torch.uint8)
        assert memory.buf is not None
        memory.buf[:16] = bytes(header.numpy())
        memory.buf[16 : 16 + len(described)] = described
        self._mapping = _Mapping(memory)
        self.name, self.layout = memory.name, layout
        self.version: int | None = None

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Makes a version the newest. Raises `WeightsError` for what is not newer or does not fit."""
        check_newer(version, self.version)
        slot = 0 if self.version is None else 1 - self._mapping.newest
        state, flat = self._mapping.states[slot], self._mapping.slots[slot]
        state[0] = 0
        self.layout.pack(tensors, out=flat)
        state[1] = checksum(flat, version)
        state[0] = version + 1
        self.version = version

    def close(self) -> None:
        """Removes the memory, for readers too once they have let it go."""
        self._mapping.close()
        self._room.remove()


class SharedSubscriber:
    """A reader in the publisher's process or in one that it started."""

    def __init__(self, name: str) -> None:
        try:
            self._mapping = _Mapping(SharedMemory(name))
        except FileNotFoundError:
            raise WeightsError(f"The shared memory {name} is gone; its publisher has ended.") from None
        self.version: int | None = None

    def newest(self) -> Snapshot | None:
        """The newest version, if it is newer than the one given last; None otherwise.

        Raises `WeightsError` when it stays damaged; the version given last then stays the reader's.
        """
        wrong = 0
        while wrong < TRIES:
            slot = self._mapping.newest
            state = self._mapping.states[slot]
            word, expected = int(state[0]), int(state[1])
            if not word or (self.version is not None and word - 1 <= self.version):
                return None
            version, flat = word - 1, self._mapping.slots[slot].clone()
            if int(state[0]) != word:
                continue  # overtaken by two newer versions
            if checksum(flat, version) == expected:
                self.version = version
                return Snapshot(version, self._mapping.layout.unpack(flat))
            wrong += 1
            time.sleep(0.001)
        raise WeightsError(f"Version {version} in shared memory has a wrong checksum; publish a newer one.")

    def close(self) -> None:
        """Lets the memory go."""
        self._mapping.close()


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT
