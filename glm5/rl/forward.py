"""One model over the rows of a micro-batch, and the log-probabilities of its sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glm5.errors import InputError
from glm5.model import GLM5, ModelOutput, Replay
from glm5.rl.head import said_of
from glm5.rl.packing import Example, Passes, Rows, micro_batches

PerExample = dict[int, Tensor]
"""Values of the sampled tokens [n] of each example, by the identity of its trajectory."""


def run(model: GLM5, rows: Rows, attention: str, collect: frozenset[str] | set[str] = frozenset()) -> ModelOutput:
    """The forward pass without the head (`head.py`), by the experts that the sampler chose where rows carry them."""
    replay = None if rows.experts_BTLK is None else _replay(model, rows.experts_BTLK)
    output: ModelOutput = model(
        rows.ids_BT, None, rows.segments_BT, attention=attention, collect={"states", *collect}, replay=replay
    )
    return output


def _replay(model: GLM5, experts_BTLK: Tensor) -> Replay:
    c, (layers, per_token) = model.config, experts_BTLK.shape[2:]
    if (layers, per_token) != (len(c.sparse_layers), c.num_experts_per_tok):
        raise InputError(
            f"The rollouts carry {per_token} experts of {layers} layers, and the model chooses {c.num_experts_per_tok} "
            f"in {len(c.sparse_layers)}; learn from rollouts of this model."
        )
    return Replay(experts=dict(zip(c.sparse_layers, experts_BTLK.unbind(2), strict=True)))


@torch.no_grad()
def fixed_logprobs(model: GLM5, examples: Sequence[Example], passes: Passes, *, replay: bool = False) -> PerExample:
    """Log-probabilities under `model`, without a gradient.

    replay: of the policy itself, with the experts that the sampler chose. Other policies (a reference, a teacher) route
    freely: what they think of a token is their own.
    """
    found: PerExample = {}
    for rows in micro_batches(examples, passes):
        if not replay:
            rows = replace(rows, experts_BTLK=None)
        said = said_of(model, run(model, rows, passes.attention), rows.sampled, passes)
        found |= by_example(rows, said.logprobs_N)
    return found


def by_example(rows: Rows, values_N: Tensor) -> PerExample:
    """Values of the tokens of a micro-batch, example by example."""
    pieces = values_N.split(rows.lengths)
    return {id(e.trajectory): piece for e, piece in zip(rows.examples, pieces, strict=True)}


def gathered(values: PerExample, rows: Rows) -> Tensor:
    """And back: [N]."""
    return torch.cat([values[id(e.trajectory)] for e in rows.examples])
