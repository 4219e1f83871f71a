"""Tensors as one run of bytes: what is copied, checked, compared and sent is always the whole, in a single call.

The unit of a publication is any dict of tensors: a model's weights, or the adapters alone. Its `Layout` (names, dtypes,
shapes, in the order given) is fixed by the first publication; every tensor begins at a multiple of 64 bytes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glm5.errors import WeightsError

ALIGNMENT = 64
Part = tuple[str, str, tuple[int, ...]]
"""Name, dtype (as `float32`) and shape of one tensor."""


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """That of these tensors. Raises `WeightsError` when there are none."""
        if not tensors:
            raise WeightsError("There are no tensors to publish; give the model's state_dict or its adapters.")
        return cls(tuple((name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()))

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """What `to_bytes` gave."""
        return cls(tuple((name, dtype, tuple(shape)) for name, dtype, shape in json.loads(data)))

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(self.parts).encode()

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """(first byte, bytes) of each tensor."""
        found, start = [], 0
        for _, dtype, shape in self.parts:
            size = torch.Size(shape).numel() * _dtype(dtype).itemsize
            found.append((start, size))
            start += size + -size % ALIGNMENT
        return found

    @property
    def num_bytes(self) -> int:
        """Of all, with the gaps between them."""
        start, size = self.places[-1]
        return start + size + -size % ALIGNMENT

    @torch.no_grad()
    def pack(self, tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """All bytes, uint8 [num_bytes] on the CPU, copied by one call; into `out` if it is given.

        Raises `WeightsError` unless names, dtypes and shapes are those of the layout.
        """
        given = Layout.of(tensors)
        if given != self:
            wrong = next((a for a, b in zip(given.parts, self.parts, strict=False) if a != b), None)
            what = f"{len(given.parts)} tensors for {len(self.parts)}" if wrong is None else f"{wrong[0]} {wrong[1:]}"
            raise WeightsError(f"The weights do not fit those published before ({what}); publish the same tensors.")
        pieces = []
        for (_, size), tensor in zip(self.places, tensors.values(), strict=True):
            pieces.append(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
            if size % ALIGNMENT:
                pieces.append(torch.zeros(-size % ALIGNMENT, dtype=torch.uint8, device=tensor.device))
        if out is None:
            out = torch.empty(self.num_bytes, dtype=torch.uint8)
        if all(piece.device.type == "cpu" for piece in pieces):
            return torch.cat(pieces, out=out)
        return out.copy_(torch.cat(pieces))

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors as views of the bytes."""
        return {
            name: flat[start : start + size].view(_dtype(dtype)).view(shape)
            for (name, dtype, shape), (start, size) in zip(self.parts, self.places, strict=True)
        }


def checksum(flat: Tensor, version: int) -> int:
    """CRC-32 of the bytes and of the version that they claim to be."""
    return zlib.crc32(flat.numpy().data, version & 0xFFFFFFFF)


def check_newer(version: int, known: int | None) -> None:
    """Raises `WeightsError` unless `version` is newer than what is there."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise WeightsError(f"The weights' version is {version!r}; give a whole number of at least 0.")
    if known is not None and version <= known:
        raise WeightsError(f"Weights of version {version} came after version {known}; versions must grow.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise WeightsError(
            f"The published weights name a dtype {name!r} that PyTorch has not; publish a newer version."
        )
    return found
