"""One process of an engine that is cut over several: its part of the model, and what it does at a word of the first.

The first process decides everything (`leader.py`): which chunks run, which blocks are copied, when weights come. It
sends each decision as one small `Command`, and then all processes, the first included, call the same method of their
`Member`: the collectives inside meet because everybody came the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from glm5.checkpoint import load_part
from glm5.engine.memory import available_bytes
from glm5.engine.paged_cache import PagedCache
from glm5.engine.pool import Storage
from glm5.engine.runner import Chunk, DraftChunk, Output, Runner
from glm5.errors import GLM5Error
from glm5.model import GLM5
from glm5.parallel.inference import Groups

Result = TypeVar("Result")


@dataclass(frozen=True)
class Setup:
    """How every process makes its part of the engine; the first process's word."""

    dtype: torch.dtype
    attention: str
    storage: Storage
    block_size: int
    draft: bool
    """Room for the rows of the MTP modules."""


@dataclass(frozen=True)
class Open:
    """Makes a cache of so many blocks; before anything else."""

    num_blocks: int


@dataclass(frozen=True)
class Run:
    """A forward pass of these chunks; `collect` as of `Runner.run`."""

    chunks: list[Chunk]
    collect: frozenset[str]


@dataclass(frozen=True)
class Draft:
    """A draft step of these chunks, which come without their states; those follow as one tensor."""

    chunks: list[DraftChunk]


@dataclass(frozen=True)
class Copy:
    """Copies of cache blocks, (from, to)."""

    pairs: list[tuple[int, int]]


@dataclass(frozen=True)
class Load:
    """New weights: every process receives its part of each, in the order of the model's names."""


@dataclass(frozen=True)
class End:
    """The engine is closed."""


Command = Open | Run | Draft | Copy | Load | End


class Member:
    """A process's part of the model; `open_cache` adds cache and runner."""

    cache: PagedCache
    runner: Runner

    def __init__(self, directory: Path, setup: Setup, groups: Groups) -> None:
        """Loads this process's part. Raises on all processes what one of them raises."""
        self.setup, self.groups = setup, groups
        loaded: list[GLM5] = []
        together(groups, lambda: loaded.append(load_part(directory, groups, setup.dtype)))
        self.model = loaded[0].eval()
        self.free = together(groups, self._free_bytes)
        """Bytes that each process may take, when all have loaded; None where a system does not say."""

    def new_cache(self, num_blocks: int, device: torch.device | str) -> PagedCache:
        """A cache of so many blocks."""
        s = self.setup
        return PagedCache(
            self.model.config, num_blocks=num_blocks, block_size=s.block_size, dtype=s.dtype, device=device,
            storage=s.storage, draft=s.draft,
        )  # fmt: skip

    # ---- what all processes do together ---------------------------------------------------------------------------
    def open_cache(self, num_blocks: int) -> None:
        """Makes the cache and the runner."""
        self.cache = self.new_cache(num_blocks, self.groups.device)
        self.runner = Runner(self.model, self.cache, attention=self.setup.attention)

    def draft(self, chunks: list[DraftChunk], states_XD: Tensor | None = None) -> list[Output]:
        """A draft step; the first process gives the states of all tokens of all chunks."""
        tokens = [len(chunk.next_ids) for chunk in chunks]
        if states_XD is None:
            width = self.model.config.hidden_size
            states_XD = torch.empty(sum(tokens), width, dtype=self.setup.dtype, device=self.groups.device)
        dist.broadcast(states_XD, group=self.groups.everyone, group_src=0)
        parts = states_XD.split(tokens)
        return self.runner.draft([replace(c, states_TD=part_TD) for c, part_TD in zip(chunks, parts, strict=True)])

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """New weights over the model's own: the first process gives whole ones, everybody gets its part of each."""
        group, part = self.groups.everyone, self.groups.part
        for name, own in self.model.state_dict().items():
            parts = None
            if weights is not None:
                whole = weights[name].detach().to(own)
                everyone = (replace(part, rank=rank) for rank in range(group.size()))
                parts = [process.take(name, whole).contiguous() for process in everyone]
            dist.scatter(own, parts, group=group, group_src=0)

    def _free_bytes(self) -> int | None:
        """Memory that this process may take: of a machine's memory, its share among the processes there."""
        free = available_bytes(self.groups.device)
        if free is None or self.groups.device.type != "cpu":
            return free
        return free // int(os.environ.get("LOCAL_WORLD_SIZE", self.groups.everyone.size()))


def together(groups: Groups, work: Callable[[], Result]) -> list[Result]:
    """What `work` gave on each process, on all of them; an error that a user can mend is raised on all."""
    mine: tuple[Result | None, GLM5Error | None] = None, None
    try:
        mine = work(), None
    except GLM5Error as error:
        mine = None, error
    everyone: list[tuple[Result, GLM5Error | None]] = [mine] * groups.meeting.size()  # type: ignore[list-item]
    dist.all_gather_object(everyone, mine, group=groups.meeting)
    for _, problem in everyone:
        if problem is not None:
            raise problem
    return [result for result, _ in everyone]
