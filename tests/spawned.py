"""Runs a function in several CPU processes (gloo) and gives back what each returned.

The processes are forked from a server that has imported everything once and computed nothing, which is as clean as
starting them and many times quicker.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "glm5.train", "glm5.parallel.fsdp", "glm5.parallel.expert", "tiny"])


def run(
    world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 600, killed: Collection[int] = ()
) -> list[Any]:
    """`function(*arguments)` in `world` processes that form a group; the results in the order of the ranks.

    Processes that are `killed` meanwhile give None.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        processes = [
            CONTEXT.Process(target=_child, args=(rank, world, root, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        for process in processes:
            if process.exitcode is None:
                process.kill()
        failures = [file.read_text() for file in sorted(root.glob("*.error"))]
        assert not failures, "\n".join(failures)
        codes = [process.exitcode for process in processes]
        assert all((code == 0) is (rank not in killed) for rank, code in enumerate(codes)), codes
        read = lambda rank: torch.load(root / f"{rank}.pt", weights_only=False)
        return [None if rank in killed else read(rank) for rank in range(world)]


def _child(rank: int, world: int, root: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=world)
        result = function(*arguments)
        dist.destroy_process_group()
        torch.save(result, root / f"{rank}.pt")
    except BaseException:
        (root / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
