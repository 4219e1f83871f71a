"""What a publication of `nano`'s weights takes: shared memory, a directory of versions, its deltas.

    python -m benchmarks.rl_weights [--repeats 10]

Between two versions every weight moves by about 1e-5, as after a step of AdamW at that rate. Prints medians and the
range; milliseconds are wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import glm5
from glm5.rl.weights import DirectoryPublisher, DirectorySubscriber, Layout, SharedPublisher, SharedSubscriber

RATE = 1e-5


def steps(dtype: torch.dtype, count: int) -> list[dict[str, Tensor]]:
    """Weights after so many steps: fp32 masters that move, in `dtype`."""
    torch.manual_seed(0)
    master = glm5.GLM5(glm5.ModelConfig.from_preset("nano")).state_dict()
    found = []
    for _ in range(count):
        master = {name: t + RATE * torch.randn_like(t) if t.is_floating_point() else t for name, t in master.items()}
        found.append({name: t.to(dtype) if t.is_floating_point() else t for name, t in master.items()})
    return found


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def show(name: str, values: list[float], unit: str = "ms") -> None:
    """One row."""
    print(f"| {name} | {statistics.median(values):.1f} {unit} | {min(values):.1f} - {max(values):.1f} |")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        weights = steps(dtype, repeats + 1)
        layout = Layout.of(weights[0])
        print(f"\n{dtype}, {layout.num_bytes / 1e6:.1f} MB\n\n| what | median | range |\n|---|---|---|")
        shared = SharedPublisher(layout)
        reader = SharedSubscriber(shared.name)
        put, took = [], []
        for version, tensors in enumerate(weights):
            put.append(timed(partial(shared.publish, version, tensors)))
            took.append(timed(reader.newest))
        shared.close()
        show("shared memory: publish", put[1:])
        show("shared memory: take", took[1:])
        for whole_every, kind, file in ((1, "whole", "weights.safetensors"), (10**6, "delta", "delta.zst")):
            with tempfile.TemporaryDirectory() as directory:
                publisher = DirectoryPublisher(directory, whole_every=whole_every, keep=repeats + 1)
                subscriber = DirectorySubscriber(directory)
                put, took, size = [], [], []
                for version, tensors in enumerate(weights):
                    put.append(timed(partial(publisher.publish, version, tensors)))
                    took.append(timed(subscriber.newest))
                    path = Path(directory) / f"v{version:08d}" / file
                    size.append(path.stat().st_size / 1e6 if path.exists() else 0.0)
                show(f"directory, {kind}: publish", put[1:])
                show(f"directory, {kind}: take", took[1:])
                show(f"directory, {kind}: size", size[1:], "MB")


if __name__ == "__main__":
    main()
