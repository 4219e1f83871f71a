"""Pools in the three formats, filled with rows whose groups of columns differ much in size."""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.engine.pool import GROUP, Pool, Storage
from glm5.ops.gpu.stored import StoredRows

FORMATS: list[Storage] = ["fp32", "bf16", "fp8"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(rows_XW: Tensor, storage: Storage) -> Pool:
    pool = Pool(*rows_XW.shape, storage, torch.device("cpu"))
    pool.write(torch.arange(len(rows_XW)), rows_XW)
    return pool


def uneven(slots: int, width: int, seed: int) -> Tensor:
    """Random rows; every group of columns of every row has a size of its own, from 1/8 to 4."""
    groups = -(-width // GROUP)
    powers = torch.randint(-3, 3, (slots, groups), generator=torch.Generator().manual_seed(seed + 1))
    sizes_XW = (2.0**powers).repeat_interleave(GROUP, 1)[:, :width]
    return normal(slots, width, seed=seed) * sizes_XW


def stored(pool: Pool) -> StoredRows:
    return StoredRows(pool.rows_XW, pool.scales_XG)


def read(pool: Pool) -> Tensor:
    """What the pool itself says it holds, fp32."""
    return pool.read(torch.arange(len(pool.rows_XW)), torch.float32)
