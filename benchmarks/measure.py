"""What the benchmark scripts share: timing with spread, peak memory of a part, a description of the machine."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Spread:
    """Seconds of several runs of one thing."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def rate(self, amount: float) -> tuple[float, float, float]:
        """Slowest, median and fastest rate, `amount` per second."""
        return amount / max(self.runs), amount / self.median, amount / min(self.runs)


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by a clock; `time.process_time` counts the processor's seconds of all threads."""
    start = clock()
    call()
    return clock() - start


def alternate(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Spread]:
    """Runs the calls in turn (A, B, A, B, ...), so that a busy machine is equally unkind to all of them."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            runs[name].append(timed(call, clock))
    return {name: Spread(tuple(times)) for name, times in runs.items()}


def ratios(ours: Spread, theirs: Spread) -> tuple[float, float, float]:
    """Lowest, median and highest ratio their time / our time, pair by pair: above 1 we are faster."""
    pairs = [b / a for a, b in zip(ours.runs, theirs.runs, strict=True)]
    return min(pairs), statistics.median(pairs), max(pairs)


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """How far the resident memory of this process rises while `call` runs (sampled every 2 ms)."""
    gc.collect()
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(peak, resident()) - before


def status_bytes(name: str) -> int:
    """A line of this process's status in Linux, such as VmHWM: the most memory that it has held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def agreement(found: Sequence[float], plain: Sequence[float]) -> str:
    """In words, how far figures are from those of the plain way, relative to these."""
    apart = max(abs(one / other - 1) for one, other in zip(found, plain, strict=True))
    return "the same" if apart == 0 else f"within {apart:.0e}"


def machine() -> dict[str, object]:
    """What a reader needs to compare figures: processor, threads, load, versions, commit."""
    info = Path("/proc/cpuinfo")
    model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), "") \
        if info.is_file() else platform.processor()  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }
