"""How much memory is left where a model lives, and how large a cache the engine makes of it.

Left out: limits that a container sets below the machine's own memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from glm5.engine.checks import check_whole
from glm5.errors import InputError

SHARE = 0.5
"""Of the free memory, the part that the cache takes when nobody says how much."""
WHOLE_CONTEXTS = 4
"""Contexts of full length that a cache holds when memory allows more."""
TOKENS_PER_SEAT = 4096
"""Tokens for each sequence that may run at once, when that is more than the whole contexts."""


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can be taken now without swapping; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: the machine's whole memory is at least an upper bound
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def cache_blocks(
    *,
    bytes_per_token: float,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    free: int | None,
    num_blocks: int | None,
    memory_bytes: int | None,
) -> int:
    """Blocks of the cache: as many as asked for (in blocks or in bytes), or what a share of the free memory holds.

    Raises InputError for both at once, for more than is free, and for less than one block.
    """
    per_block = bytes_per_token * block_size
    if num_blocks is not None and memory_bytes is not None:
        raise InputError("num_blocks and memory_bytes both give the size of the cache; give one of them.")
    if num_blocks is not None:
        check_whole("num_blocks", num_blocks, 1)
        blocks = num_blocks
    elif memory_bytes is not None:
        check_whole("memory_bytes", memory_bytes, 1)
        blocks = int(memory_bytes // per_block)
    else:
        tokens = max(WHOLE_CONTEXTS * max_model_len, max_num_seqs * min(TOKENS_PER_SEAT, max_model_len))
        blocks = -(-tokens // block_size)
        if free is not None:
            blocks = min(blocks, int(SHARE * free // per_block))
    needed = max(blocks, 1) * per_block
    if blocks < 1 or (free is not None and needed > free):
        there = memory_bytes if blocks < 1 and memory_bytes is not None else free or 0
        raise InputError(
            f"A cache of {max(blocks, 1):,} block(s) of {block_size} tokens takes {needed / 1e9:,.3f} GB; "
            f"{there / 1e9:,.3f} GB are there for it. Give another memory_bytes or num_blocks, or free some memory."
        )
    return blocks
