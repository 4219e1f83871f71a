"""What the trainer thought of each token that it learnt from, before it did: a small file a step beside the journal.

The journal holds the sampler's log-probabilities; with the trainer's the viewer colours tokens by their ratio, which is
what the losses look at. Nothing else needs these files: without them the page has no such colours. Four bytes a token
before they are packed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np

from glm5.files import replacing
from glm5.rl.records import Rollout

SEEN = "logprobs"
"""The directory in that of the run."""
TrainerLogprobs = dict[str, list[list[float]]]
"""By rollout: of each trajectory, of its sampled tokens in order."""


def write_seen(run_directory: Path, step: int, logprobs: TrainerLogprobs) -> None:
    """Those of a step's batch."""
    values = [value for paths in logprobs.values() for path in paths for value in path]
    counts = [sum(map(len, paths)) for paths in logprobs.values()]
    (run_directory / SEEN).mkdir(exist_ok=True)
    with replacing(_place(run_directory, step)) as file:
        np.savez_compressed(
            file, ids=np.array(list(logprobs), dtype=str), counts=np.array(counts), values=np.array(values, np.float32)
        )


def read_seen(run_directory: Path, learnt: Iterable[tuple[int, Rollout]]) -> TrainerLogprobs:
    """Of rollouts with the steps that learnt from them, as far as there are files."""
    wanted: dict[int, dict[str, Rollout]] = {}
    for step, rollout in learnt:
        wanted.setdefault(step, {})[rollout.id] = rollout
    found: TrainerLogprobs = {}
    for step, rollouts in wanted.items():
        place = _place(run_directory, step)
        if not place.exists():
            continue
        with np.load(place, allow_pickle=False) as file:
            ids, counts, values = file["ids"].tolist(), file["counts"].tolist(), file["values"].tolist()
        for name, count, end in zip(ids, counts, accumulate(counts), strict=True):
            if name in rollouts and rollouts[name].num_sampled == count:
                rest = iter(values[end - count : end])
                found[name] = [[next(rest) for _ in range(t.num_sampled)] for t in rollouts[name].trajectories]
    return found


def _place(run_directory: Path, step: int) -> Path:
    return run_directory / SEEN / f"{step:08d}.npz"
