"""From a batch to rows of tokens: which tokens count in the loss, with which weight, and where they stand.

A `Lesson` becomes one `Example` for each of its trajectories. Every sampled token stands in exactly one of them, with
its share of the step's loss, so that rows, micro-batches and their order cannot change a gradient:

| normalisation | share of a token of rollout i, which weighs w_i, has n_i sampled tokens in all its trajectories |
|---|---|
| sequence-mean | w_i / (sum w) / n_i: every rollout weighs the same (GLM-5 report, eq. 1) |
| token-mean | w_i / (sum w n): every token does |
| fixed-length | w_i / (sum w) / L for a constant L: no length is preferred (Dr.GRPO, arXiv 2503.20783) |

So the sequence of "sequence-mean" is the rollout: an episode that splits into five trajectories weighs as much as one
that does not, and the advantage of the rollout is that of all its tokens. A repeat in a repaired group is a factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glm5.errors import InputError
from glm5.model import LOGITS
from glm5.rl.advantages import Advantages, rollout_advantages
from glm5.rl.records import Batch, Lesson, Trajectory

Normalisation = Literal["sequence-mean", "token-mean", "fixed-length"]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How examples are cut into forward passes."""

    attention: Literal["sparse", "dense"]
    rows: int
    """At most, of one pass."""
    tokens: int
    """At most, of one pass: its rows times the longest of them. A row that is longer has a pass of its own."""
    row_tokens: int | None
    """Pack whole trajectories into rows of that many; None: one trajectory a row."""
    logits: int = LOGITS
    """Held at once, of sampled tokens (`head.py`)."""
    temperature: float = 1.0
    """At which the policy samples: it is this distribution that is judged, also by a reference or a teacher."""


@dataclass(frozen=True, slots=True)
class Example:
    """One trajectory that is learnt from."""

    trajectory: Trajectory
    advantage: float
    """Of its rollout."""
    weight: float
    """Of each of its sampled tokens."""
    reward: float
    """Of its rollout."""
    environment: str
    sampled: tuple[int, ...]
    """Indices of the tokens that count."""
    ages: tuple[int, ...]
    """Of these tokens: versions between the weights that sampled them and those before the step."""
    repeats: int = 1
    """Rollouts that its own stands for."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A lesson with the advantage of its rollout."""

    lesson: Lesson
    advantage: float


def judged(batch: Batch, advantages: Advantages) -> list[Judged]:
    """Every lesson of the batch that has sampled tokens, in order."""
    lessons = [lesson for group in batch.groups for lesson in group.lessons]
    values = [value for group in rollout_advantages(batch.groups, advantages) for value in group]
    return [Judged(lesson, a) for lesson, a in zip(lessons, values, strict=True) if lesson.rollout.num_sampled]


def examples_of(
    lessons: Sequence[Judged], normalisation: Normalisation, *, fixed_length: int, version: int
) -> list[Example]:
    """Their trajectories in order, with the weights of one update from exactly these lessons.

    Raises InputError for tokens of a later version than `version`.
    """
    shares = token_shares([one.lesson for one in lessons], normalisation, fixed_length)
    return [
        example
        for one, share in zip(lessons, shares, strict=True)
        for trajectory in one.lesson.rollout.trajectories
        if (example := _example(trajectory, one, share, version)) is not None
    ]


def token_shares(lessons: Sequence[Lesson], normalisation: Normalisation, fixed_length: int) -> list[float]:
    """The weight of each sampled token of every lesson; together 1, but for `fixed-length`."""
    weights = [lesson.weight for lesson in lessons]
    lengths = [lesson.rollout.num_sampled for lesson in lessons]
    rollouts, tokens = sum(weights), sum(w * n for w, n in zip(weights, lengths, strict=True))
    if normalisation == "sequence-mean":
        return [w / (rollouts * n) for w, n in zip(weights, lengths, strict=True)]
    return [w / (rollouts * fixed_length if normalisation == "fixed-length" else tokens) for w in weights]


def _example(t: Trajectory, one: Judged, share: float, version: int) -> Example | None:
    sampled = tuple(i for i, counts in enumerate(t.sampled) if counts)
    if not sampled:
        return None
    ages = tuple(version - t.versions[i] for i in sampled)
    if min(ages) < 0:
        raise InputError(
            f"Rollout {one.lesson.rollout.id} holds a token of version {version - min(ages)}, and the batch is of "
            f"version {version}; a batch cannot be older than what it holds."
        )
    rollout = one.lesson.rollout
    assert rollout.reward is not None
    return Example(
        t, one.advantage, share, rollout.reward.value, rollout.ticket.environment, sampled, ages, one.lesson.weight
    )


@dataclass(frozen=True, slots=True)
class Places:
    """Where tokens [N] come out: the logits of row `rows_N[n]`, column `columns_N[n]` predict token `targets_N[n]`."""

    rows_N: Tensor
    columns_N: Tensor
    targets_N: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """A micro-batch: what goes into the model, and where the sampled tokens [N] of its examples come out."""

    examples: tuple[Example, ...]
    ids_BT: Tensor
    segments_BT: Tensor | None
    """None: one trajectory a row, padded on the right, which causal attention does not see."""
    sampled: Places
    lengths: tuple[int, ...]
    """Sampled tokens of each example."""
    experts_BTLK: Tensor | None
    """int64, of every sparse layer the experts that the sampler chose, -1 where that is not known; None: nowhere."""

    def per_token(self, values: Sequence[float]) -> Tensor:
        """One value of each example [N], float32."""
        return torch.tensor(values).repeat_interleave(torch.tensor(self.lengths))


def micro_batches(examples: Sequence[Example], passes: Passes) -> Iterator[Rows]:
    """The rows of one forward pass after the other, in the order of the examples, or packed."""
    if passes.row_tokens is None:
        for some in _in_passes([[example] for example in examples], passes):
            yield padded([example for (example,) in some])
        return
    for some in _in_passes(_first_fit(examples, passes.row_tokens), passes):
        yield packed(some)


def _in_passes(rows: Sequence[list[Example]], passes: Passes) -> Iterator[list[list[Example]]]:
    """As many rows at a time as a pass takes; at least one."""
    some: list[list[Example]] = []
    widest = 0
    for row in rows:
        wider = max(widest, sum(map(_inputs, row)))
        if some and (len(some) == passes.rows or (len(some) + 1) * wider > passes.tokens):
            yield some
            some, wider = [], sum(map(_inputs, row))
        some.append(row)
        widest = wider
    if some:
        yield some


def padded(examples: Sequence[Example]) -> Rows:
    """One trajectory a row."""
    longest = max(len(example.trajectory.token_ids) for example in examples)
    ids = [[*e.trajectory.token_ids, *([0] * (longest - len(e.trajectory.token_ids)))] for e in examples]
    return _rows(examples, torch.tensor(ids)[:, :-1], None, [(row, 0) for row in range(len(examples))])


def packed(bins: Sequence[Sequence[Example]]) -> Rows:
    """Several trajectories a row, each a segment of its own."""
    width = max(sum(_inputs(e) for e in some) for some in bins)
    ids_BT = torch.zeros(len(bins), width, dtype=torch.int64)
    segments_BT = torch.full((len(bins), width), -1)
    places: list[tuple[int, int]] = []
    for row, some in enumerate(bins):
        start = 0
        for segment, example in enumerate(some):
            end = start + _inputs(example)
            ids_BT[row, start:end] = torch.tensor(example.trajectory.token_ids[:-1])
            segments_BT[row, start:end] = segment
            places.append((row, start))
            start = end
    return _rows([e for some in bins for e in some], ids_BT, segments_BT, places)


def _inputs(example: Example) -> int:
    """Tokens that go into the model: the last one is a target only."""
    return len(example.trajectory.token_ids) - 1


def _rows(
    examples: Sequence[Example], ids_BT: Tensor, segments_BT: Tensor | None, places: Sequence[tuple[int, int]]
) -> Rows:
    where = [
        (row, start + i - 1, e.trajectory.token_ids[i])
        for e, (row, start) in zip(examples, places, strict=True)
        for i in e.sampled
    ]
    sampled = Places(*torch.tensor(where).unbind(1))
    lengths = tuple(len(e.sampled) for e in examples)
    experts_BTLK = _experts(examples, ids_BT, places)
    return Rows(tuple(examples), ids_BT, segments_BT, sampled, lengths, experts_BTLK)


def _experts(examples: Sequence[Example], ids_BT: Tensor, places: Sequence[tuple[int, int]]) -> Tensor | None:
    experts_BTLK: Tensor | None = None
    for example, (row, start) in zip(examples, places, strict=True):
        if example.trajectory.experts is None:
            continue
        experts_TLK = example.trajectory.experts.array[: _inputs(example)]
        if experts_BTLK is None:
            experts_BTLK = torch.full((*ids_BT.shape, *experts_TLK.shape[1:]), -1)
        experts_BTLK[row, start : start + len(experts_TLK)] = torch.from_numpy(experts_TLK.astype(np.int64))
    return experts_BTLK


def _first_fit(examples: Sequence[Example], most: int) -> list[list[Example]]:
    """Longest first, each into the first row that has room; a longer one has a row of its own."""
    bins: list[tuple[int, list[Example]]] = []
    for example in sorted(examples, key=_inputs, reverse=True):
        size = _inputs(example)
        for i, (used, some) in enumerate(bins):
            if used + size <= most:
                some.append(example)
                bins[i] = (used + size, some)
                break
        else:
            bins.append((size, [example]))
    return [some for _, some in bins]
