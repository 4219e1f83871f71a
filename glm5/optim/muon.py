"""Muon, with Muon Split: in a parameter that stacks heads or experts, each is orthogonalised by itself.

GLM-5 report, section 2.1 (Muon Split) and appendix A (momentum 0.95, five Newton-Schulz steps, update RMS 0.2). W^UQ,
W^UK and W^UV are cut per head, stacked experts per expert, gate and up apart; orthogonalising them as one matrix would
tie the step of one head to the gradients of another, and MLA's attention logits then grow without bound. Non-rotary and
rotary rows stay together: in each head of W^UQ (`q_b_proj`) and in `kv_a_proj_with_mqa`, which is one matrix. Each
update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the root mean square of an AdamW update (Moonlight,
arXiv 2502.16982, section 2.2), so one learning rate serves both optimisers.

Where parameters are cut over processes, momentum stays cut, and `shards.py` brings matrices together. Same-shaped
matrices of several layers go through Newton-Schulz as one batch, which changes no bit of any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glm5.optim.newton_schulz import orthogonalise, working_dtype
from glm5.optim.shards import Cut, exchanged, gathered, local

UPDATE_RMS = 0.2
BATCH = {"cpu": 2**18, "cuda": 2**26}
"""Elements of a Newton-Schulz batch: on a CPU what a cache holds (measured: larger batches are slower)."""
BUCKET = 2**27
"""Elements whose directions are held at once, over all processes that share them."""


@dataclass(frozen=True)
class Split:
    """How a parameter falls into matrices."""

    cut: Callable[[Tensor], list[Tensor]]
    """Views [matrices, rows, columns] that cover a tensor of the parameter's shape once."""
    unit: int | None = None
    """Entries of the first dimension that stay together; None: all. A multiple of them can be cut just as well."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The views."""
        return self.cut(x)

    def scales(self, x: Tensor) -> list[float]:
        """The factor of each view's update, for a parameter of the shape of `x`."""
        return [UPDATE_RMS * math.sqrt(max(view.shape[-2:])) for view in self.cut(torch.empty(x.shape, device="meta"))]


whole = Split(lambda x: [x.unsqueeze(0)])
"""A plain matrix [rows, columns]."""


def heads(*widths: int) -> Split:
    """A projection [heads * sum(widths), columns] whose heads each stack matrices of `widths` rows."""
    return Split(lambda x: list(x.unflatten(0, (-1, sum(widths))).split(widths, dim=1)), sum(widths))


def experts(parts: int) -> Split:
    """Stacked experts [E, parts * rows, columns], each of `parts` matrices on top of one another."""
    return Split(lambda x: list(x.chunk(parts, dim=1)), 1)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; decoupled weight decay. On plain matrices equal to `torch.optim.Muon`.

    `parameters` pairs each parameter with its `Split`. A parameter without a gradient is left alone, decay included.
    Parameters may be DTensors: N processes take the step of one, each orthogonalising its share of the matrices.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[nn.Parameter, Split]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        pairs = list(parameters)
        self._splits = dict(pairs)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([parameter for parameter, _ in pairs], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for bucket in _buckets(moving):
                directions = [self._direction(parameter, group["momentum"]) for parameter in bucket]
                for parameter, update in zip(bucket, self._updates(bucket, directions), strict=True):
                    weights = local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
                    scales = self._splits[parameter].scales(parameter)
                    if len(set(scales)) > 1:  # per row, so that a cut through a head changes nothing
                        update = update * _scale_column(parameter, self._splits[parameter], scales)
                        weights.add_(update, alpha=-group["lr"])
                    else:
                        weights.add_(update, alpha=-group["lr"] * scales[0])

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """This process's part of the momentum, one step ahead of the average (Nesterov)."""
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average = local(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum).to(working_dtype(gradient.device))

    def _updates(self, parameters: list[nn.Parameter], directions: list[Tensor]) -> list[Tensor]:
        """The orthogonalised directions, of this process's part of each parameter."""
        updates: list[Tensor] = list(directions)
        cuts = [Cut.of(parameter, self._splits[parameter].unit) for parameter in parameters]
        here = [i for i, cut in enumerate(cuts) if cut is None]
        done = orthogonalise_each([(self._splits[parameters[i]], directions[i]) for i in here])
        for i, update in zip(here, done, strict=True):
            updates[i] = update

        exchanges: dict[object, list[int]] = {}
        for i, cut in enumerate(cuts):
            if cut is None:
                continue
            if cut.by_rows:
                exchanges.setdefault(cut.group, []).append(i)
            else:
                updates[i] = gathered(cut, directions[i], self._splits[parameters[i]], orthogonalise_each)
        for members in exchanges.values():
            splits = [self._splits[parameters[i]] for i in members]
            known = [cut for i in members if (cut := cuts[i]) is not None]
            done = exchanged(known, [directions[i] for i in members], splits, orthogonalise_each)
            for i, update in zip(members, done, strict=True):
                updates[i] = update
        return updates


def orthogonalise_each(pairs: list[tuple[Split, Tensor]]) -> list[Tensor]:
    """Every tensor with each of its matrices orthogonalised; matrices of one shape run as batches."""
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for _, x in pairs]
    by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for result, (split, x) in zip(results, pairs, strict=True):
        for place, matrices in zip(split(result), split(x), strict=True):
            if matrices.numel():
                by_shape.setdefault(tuple(matrices.shape[1:]), []).append((place, matrices))
    for found in by_shape.values():
        for batch in _batches(found):
            matrices = torch.cat([m for _, m in batch]) if len(batch) > 1 else batch[0][1]
            parts = orthogonalise(matrices).split([len(m) for _, m in batch])
            for (place, _), part in zip(batch, parts, strict=True):
                place.copy_(part)
    return results


def _batches(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The pairs in groups of at most `BATCH` elements (or one alone)."""
    most = BATCH.get(pairs[0][1].device.type, BATCH["cuda"])
    batch: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        if batch and sum(m.numel() for _, m in batch) + pair[1].numel() > most:
            yield batch
            batch = []
        batch.append(pair)
    yield batch


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in groups of about `BUCKET` elements; the same groups on every process."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _scale_column(parameter: nn.Parameter, split: Split, scales: list[float]) -> Tensor:
    """The factor of every row that this process holds of a matrix [rows, columns]."""
    column = torch.empty(parameter.shape[0], 1, device=parameter.device)
    for part, scale in zip(split(column), scales, strict=True):
        part.fill_(scale)
    rows = Cut.rows_of(parameter)
    return column[rows]
