"""An engine that is cut over processes: the first process leads (scheduler, sampler and API are there), others follow.

`Leader` stands where a runner, a cache and weights stand in an engine of one process. Before each of its steps it sends
the others what to do (`member.py`), then does the same. A follower waits for words as long as the leader lives.

When a process ends or fails, its connections close and the others' collectives fail with them; one that hangs is given
up after the plan's timeout. The engine cannot go on then: every request ends with `ParallelError`, and so do the calls
of `follow`. Nothing is restarted here; torchrun ends the remaining processes when one of them fails.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from glm5.engine.backend import Backend, CacheSize, check_drafts, speculator_of
from glm5.engine.member import Command, Copy, Draft, End, Load, Member, Open, Run, Setup
from glm5.engine.pool import Storage, check_storage
from glm5.engine.runner import Chunk, DraftChunk, Output
from glm5.engine.weights import checked, finite
from glm5.errors import InputError, ParallelError
from glm5.model import GLM5
from glm5.model.checks import check_attention
from glm5.parallel.inference import Groups, open_groups
from glm5.parallel.inference_plan import InferencePlan

Result = TypeVar("Result")


def leader_of(
    model: object,
    plan: InferencePlan | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attention: str,
    storage: Storage | None,
    block_size: int,
    strict: bool,
    drafts: int,
) -> Leader | None:
    """The first process of an engine that is cut over several; None where one is enough.

    Raises `InputError` for what is not done over processes, and what `Leader` raises.
    """
    if plan is None or plan.processes == 1:
        return None
    if not isinstance(model, str | Path):
        raise InputError("With `parallel` each process reads its own part of a directory; give that, and no model.")
    if strict:
        raise InputError(
            "Strict mode promises the bits of one process, and several add their parts in another order; use one "
            "process, or leave strict out."
        )
    check_attention(attention)
    storage = storage or ("fp32" if dtype == torch.float32 else "bf16")
    check_storage(storage)
    return Leader(Path(model), plan, Setup(dtype, attention, storage, block_size, drafts > 0), device)


class Leader:
    """The first process of an engine."""

    def __init__(self, directory: Path, plan: InferencePlan, setup: Setup, device: torch.device) -> None:
        """Waits for the others to come and for all to load. Raises `GLM5Error` when one of them cannot."""
        groups = open_groups(plan, device)
        if groups.part.rank != 0:
            raise InputError(
                f"This is process {groups.part.rank}; the first makes the Engine, the others call "
                "glm5.engine.follow(directory, plan)."
            )
        self.plan = plan
        self.on_lost: Callable[[str], None] | None = None
        """Called once with the sentence when the engine is given up, from the thread that noticed."""
        self._groups = groups
        self._lost: str | None = None
        try:
            _tell(groups, setup)
            self._member = Member(directory, setup, groups)
        except RuntimeError as error:
            raise ParallelError(f"Another process ended while the model was loaded ({_first_line(error)}).") from error
        self.model = self._member.model
        self.cache_bytes_per_token = self._member.new_cache(1, "meta").bytes_per_token
        self._whole = GLM5(self.model.config, dtype=setup.dtype, device="meta").state_dict()

    def open(self, size: CacheSize, *, drafts: int) -> Backend:
        """The cache, as large as the process with the least room allows, and what runs over it."""
        check_drafts(self.model, drafts)
        free = min((bytes_ for bytes_ in self._member.free if bytes_ is not None), default=None)
        blocks = size.blocks(self.cache_bytes_per_token, free)
        self._all(Open(blocks), lambda: self._member.open_cache(blocks))
        experts = bool(self.model.config.sparse_layers)
        return Backend(self, self, blocks, self, speculator_of(self, drafts, size), experts)

    # ---- as a runner ------------------------------------------------------------------------------------------------
    def run(self, chunks: list[Chunk], collect: frozenset[str] = frozenset()) -> list[Output]:
        """See `Runner`."""
        return self._all(Run(chunks, collect), lambda: self._member.runner.run(chunks, collect))

    def draft(self, chunks: list[DraftChunk]) -> list[Output]:
        """See `Runner`; every step is of the first MTP module."""
        states_XD = torch.cat([chunk.states_TD for chunk in chunks])
        nothing = torch.empty(0)
        bare = [DraftChunk(nothing, chunk.next_ids, chunk.start, chunk.block_table) for chunk in chunks]
        return self._all(Draft(bare), lambda: self._member.draft(bare, states_XD))

    # ---- as a cache -------------------------------------------------------------------------------------------------
    @property
    def bytes_per_block(self) -> int:
        """Of all layers together, in each process."""
        return self._member.cache.bytes_per_block

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """See `PagedCache`."""
        self._all(Copy(pairs), lambda: self._member.cache.copy_blocks(pairs))

    # ---- as weights -------------------------------------------------------------------------------------------------
    def staged(self, state_dict: Mapping[str, Tensor], version: int) -> Mapping[str, Tensor]:
        """The new weights themselves, checked. They are cut and sent when they are put in place."""
        checked(self._whole, state_dict)
        for name, tensor in state_dict.items():
            finite(name, tensor.detach().to(self._whole[name].dtype), version)
        return state_dict

    def swap(self, ready: Mapping[str, Tensor]) -> None:
        """Every process takes its part of every weight; no step runs meanwhile."""
        self._all(Load(), lambda: self._member.load(ready))

    # ---- the others -------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Lets the followers end. More steps are refused."""
        if self._lost is None:
            self._lost = "This engine is closed; make a new one."
            self._dismiss()

    def _dismiss(self) -> None:
        with contextlib.suppress(Exception):  # they have ended already, or the group has
            _tell(self._groups, End())

    def _all(self, command: Command, act: Callable[[], Result]) -> Result:
        """Sends the command and does the same here."""

        def both() -> Result:
            _tell(self._groups, command)
            return act()

        return self._guarded(both)

    def _guarded(self, work: Callable[[], Result]) -> Result:
        """`work`; when it fails, the processes are no longer at the same place and the engine is given up."""
        if self._lost is not None:
            raise ParallelError(self._lost)
        try:
            return work()
        except InputError:  # of the command itself, which every process refuses alike
            raise
        except Exception as error:
            self._lost = (
                f"The engine is cut over {self.plan.processes} processes, and a step failed in one of them, or one has "
                f"ended or did not answer for {self.plan.timeout_seconds:g} s ({_first_line(error)}); start them again."
            )
            if self.on_lost is not None:
                self.on_lost(self._lost)
            # Who still waits for words ends; nobody here waits for those that take none.
            threading.Thread(target=self._dismiss, name="glm5-dismiss", daemon=True).start()
            raise ParallelError(self._lost) from error


def follow(directory: str | Path, plan: InferencePlan, *, device: str | torch.device = "cpu") -> None:
    """What every process but the first does: its part of each step, until the engine is closed.

    `directory`, `plan` and `device` as the first process gives them to its `Engine`; all else comes from there. Raises
    `ParallelError` when the first process is gone or a step fails, `InputError` and `CheckpointError` as `Engine`.
    """
    groups = open_groups(plan, torch.device(device))
    if groups.part.rank == 0:
        raise InputError("This is the first process, which makes the Engine; only the others follow.")
    setup = _heard(groups)
    assert isinstance(setup, Setup)
    try:
        member = Member(Path(directory), setup, groups)
    except RuntimeError as error:
        raise ParallelError(f"Another process ended while the model was loaded ({_first_line(error)}).") from error
    while not isinstance(command := _heard(groups), End):
        try:
            _perform(member, command)
        except InputError:
            pass  # the leader's request ends with it
        except Exception as error:
            raise ParallelError(
                f"A step failed in process {groups.part.rank}, or another one ended or did not answer for "
                f"{plan.timeout_seconds:g} s ({_first_line(error)}); start all processes again."
            ) from error


def _perform(member: Member, command: Any) -> None:
    match command:
        case Open(num_blocks):
            member.open_cache(num_blocks)
        case Run(chunks, collect):
            member.runner.run(chunks, collect)
        case Draft(chunks):
            member.draft(chunks)
        case Copy(pairs):
            member.cache.copy_blocks(pairs)
        case Load():
            member.load()


def _tell(groups: Groups, word: Command | Setup) -> None:
    dist.broadcast_object_list([word], group=groups.words, group_src=0)


def _heard(groups: Groups) -> Any:
    word: list[Any] = [None]
    try:
        dist.broadcast_object_list(word, group=groups.words, group_src=0)
    except RuntimeError as error:
        raise ParallelError(f"The first process of this engine has ended ({_first_line(error)}).") from error
    return word[0]


def _first_line(error: BaseException) -> str:
    """Its type and first line, without the place in the C++ sources that gloo's begin with."""
    lines = re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].split('. This is', 1)[0].rstrip('.')}"
