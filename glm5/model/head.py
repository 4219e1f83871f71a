"""The output head over some tokens, a piece of them at a time: what a loss wants of their logits, in bounded memory.

A vocabulary of 154,880 makes 620 kB of float32 logits a position, and a loss holds several tensors of their size. So
where the logits of a whole pass are more than may be held at once, the model leaves its head to the caller of this file
(`collect={"states"}`): it is applied to the tokens that count alone, a piece of them at a time, and, unless these are
few, once more in the backward pass instead of keeping what that needs (Chen et al. 2016, arXiv 1604.06174).

The head is called as the module that it is, so adapters, autocast, and a vocabulary that is cut over processes work as
in the model. Left out: gradients that are made going forward (Liger, arXiv 2410.10989; `F.linear_cross_entropy`). They
save the second run of the head, but the loss must be linear in the log-probabilities, that of RL is not, and each head
(trunk and draft steps) holds a gradient of the whole vocabulary table from its forward pass to its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glm5.model.transformer import GLM5

R = TypeVar("R")
LOGITS = 1 << 26
"""That are held at once, if nothing else is said: 256 MiB in float32."""


def logits_in(mib: int) -> int:
    """How many float32 logits so many MiB hold."""
    return mib << 18


def without_head(model: GLM5, ids_BT: Tensor, collect: frozenset[str] | set[str], most: int) -> frozenset[str]:
    """The names to collect: also "states" where the logits of all positions would be more than `most`."""
    heads = 1 + (model.mtp_steps if "mtp" in collect else 0)
    many = model.rows.part(ids_BT).numel() * model.config.vocab_size * heads > most
    return frozenset(collect) | {"states"} if many else frozenset(collect)


def by_pieces(
    model: GLM5,
    states_ND: Tensor,
    targets_N: Tensor,
    judge: Callable[[Tensor, Tensor], R],
    most: int,
    *,
    heads: int = 1,
) -> list[R]:
    """`judge(logits_MV, targets_M)` of one piece of the tokens after the other; differentiable.

    A piece has at most `most` logits, but at least one token; there is at least one piece, if an empty one. heads: of
    the pass, each with as many tokens: where all their logits are at most `most`, what this one made is kept for the
    backward pass; else each piece is made again there.
    """

    def piece(states_MD: Tensor, targets_M: Tensor) -> R:
        device = states_MD.device.type
        narrow, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # A weight that autocast narrows once for all pieces would have their gradients summed in bf16.
        with torch.autocast(device, dtype, enabled=narrow, cache_enabled=False):
            return judge(model.lm_head(states_MD), targets_M)

    size = max(most // model.config.vocab_size, 1)
    if len(states_ND) * heads <= size:
        return [piece(states_ND, targets_N)]
    return [
        checkpoint(piece, states_MD, targets_M, use_reentrant=False, preserve_rng_state=False)
        for states_MD, targets_M in zip(states_ND.split(size), targets_N.split(size), strict=True)
    ]
