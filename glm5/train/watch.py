"""Where else the metrics go: TensorBoard and trackio, by choice; `metrics.jsonl` stays the truth.

Both write into the run directory and need no network: `tensorboard --logdir RUN/tensorboard`, `trackio show` with
TRACKIO_DIR=RUN/trackio. They come with the extra `watch`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from glm5.errors import RunError

Watcher = Literal["tensorboard", "trackio"]
Write = Callable[[int, dict[str, Any]], None]


@contextlib.contextmanager
def watchers(names: tuple[Watcher, ...], run_directory: Path, first: int) -> Iterator[Write]:
    """Gives the function that sends the numbers of a step to each of `names`; lines from `first` on are new.

    Raises RunError when a package is not installed.
    """
    opened = {"tensorboard": tensorboard, "trackio": trackio}
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(opened[name](run_directory, first)) for name in names]

        def write(step: int, values: dict[str, Any]) -> None:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
            for writer in writers:
                writer(step, numbers)

        yield write


@contextlib.contextmanager
def tensorboard(run_directory: Path, first: int) -> Iterator[Write]:
    """An event file; steps from `first` on that an earlier session wrote are purged."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing("tensorboard") from error
    writer = SummaryWriter(str(run_directory / "tensorboard"), purge_step=first)

    def write(step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        writer.close()


@contextlib.contextmanager
def trackio(run_directory: Path, first: int) -> Iterator[Write]:
    """A local database in the run directory, one run under the run directory's name."""
    os.environ.setdefault("TRACKIO_DIR", str((run_directory / "trackio").resolve()))
    try:
        import trackio as library
    except ImportError as error:
        raise missing("trackio") from error
    run = library.init(
        project=run_directory.resolve().parent.name, name=run_directory.name, resume="allow", embed=False,
        auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    try:
        yield lambda step, values: run.log(values, step=step)
    finally:
        run.finish()


def missing(package: str) -> RunError:
    """The error of a package that is not there."""
    return RunError(f"{package} is not installed; `pip install glm5[watch]`, or leave it out of `watch`.")
