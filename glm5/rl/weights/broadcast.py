"""Weights over `torch.distributed`: rank `source` publishes, every other rank of the group receives.

A publication is a header of four numbers, the layout when it is new, and the bytes in pieces of `PIECE`; each is one
broadcast, for all tensors together. It is a collective: every rank takes part, and the group's own timeout ends the
wait for one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from glm5.errors import WeightsError
from glm5.rl.weights.layout import Layout, check_newer, checksum
from glm5.rl.weights.shared import Snapshot

PIECE = 1 << 28
"""Bytes that one broadcast sends."""


class BroadcastPublisher:
    """The source. All tensors go through the memory of `device`: the CPU for gloo, a GPU for NCCL."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, source: int = 0, device: str = "cpu") -> None:
        self.group, self.source, self.device = group, source, device
        self.version: int | None = None
        self._layout: Layout | None = None

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Sends a version. Raises `WeightsError`, before anything is sent, for what is not newer or does not fit."""
        check_newer(version, self.version)
        layout = self._layout or Layout.of(tensors)
        flat = layout.pack(tensors)
        described = b"" if self._layout is not None else layout.to_bytes()
        header = torch.tensor([version, checksum(flat, version), len(described), layout.num_bytes])
        self._send(header)
        if described:
            self._send(torch.frombuffer(bytearray(described), dtype=torch.uint8))
        for piece in flat.split(PIECE):
            self._send(piece)
        self.version, self._layout = version, layout

    def _send(self, data: Tensor) -> None:
        dist.broadcast(data.to(self.device), self.source, group=self.group)


class BroadcastSubscriber:
    """A receiver."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, source: int = 0, device: str = "cpu") -> None:
        self.group, self.source, self.device = group, source, device
        self.version: int | None = None
        self._layout: Layout | None = None

    def receive(self) -> Snapshot:
        """Waits for the next publication. Raises `WeightsError` for one that is damaged or not newer; the next may
        be right."""
        version, expected, described, size = self._take(torch.empty(4, dtype=torch.int64)).tolist()
        if described:
            self._layout = Layout.from_bytes(bytes(self._take(torch.empty(described, dtype=torch.uint8)).numpy()))
        flat = torch.empty(size, dtype=torch.uint8)
        for piece in flat.split(PIECE):
            piece.copy_(self._take(torch.empty_like(piece)))
        check_newer(version, self.version)
        if self._layout is None or checksum(flat, version) != expected:
            raise WeightsError(f"Version {version} was damaged on its way; publish it anew under the next number.")
        self.version = version
        return Snapshot(version, self._layout.unpack(flat))

    def _take(self, room: Tensor) -> Tensor:
        room = room.to(self.device)
        dist.broadcast(room, self.source, group=self.group)
        return room.cpu()
